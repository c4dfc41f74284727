"""Texts that would run, load or restyle something if a page took them for markup."""
# ruff: noqa: E501

RUN = "window.ran=1;alert(1);fetch('/ran')"
ELSEWHERE = "http://127.0.0.2:9/ran"
MARKUP = (
    f"<script>{RUN}</script>",
    f"<script src=/ran></script><script src={ELSEWHERE}></script>",
    f"<script type=module>import '/ran';{RUN}</script>",
    f'"><img src=/ran onerror="{RUN}"><img srcset="{ELSEWHERE} 1x">',
    f"'><svg onload={RUN}><animate onbegin={RUN} attributeName=x dur=1s></svg>",
    f"<svg><script>{RUN}</script><use href={ELSEWHERE}#x></svg><math><mi xlink:href=/ran>",
    "<style>*{display:none!important}@import '/ran';body{background:url(/ran)}</style>",
    f"<link rel=stylesheet href=/ran><link rel=prefetch href={ELSEWHERE}>",
    f'<iframe srcdoc="<script>parent.{RUN}</script>"></iframe><iframe src=/ran></iframe>',
    "<base href=http://127.0.0.2:9/><meta http-equiv=refresh content=0;url=/ran>",
    f"<form action=/ran><button autofocus onfocus={RUN} formaction=/ran>x</button></form>",
    f"<input name=main id=thread autofocus onfocus={RUN}><a id=card name=notice href=/ran>x</a>",
    f"<details open ontoggle={RUN}><video src=/ran onerror={RUN}><audio src=/ran><object data=/ran>",
    f"<embed src=/ran><template shadowrootmode=open><script>{RUN}</script></template>",
    '<b style="position:fixed;inset:0;background:red" class="failure notice" id=status>b</b>',
    f"<noscript><p title='</noscript><img src=x onerror={RUN}>'>",
    f"]]><!--><img src=/ran onerror={RUN}>--><![CDATA[<img src=/ran>]]><?xml-stylesheet href='/ran'?>",
    f"&lt;img src=x onerror={RUN}&gt; &#60;script&#62;{RUN}&#60;/script&#62; ${{{RUN}}} {{{{7*7}}}}",
)
MARKDOWN = (
    f"[a](javascript:{RUN}) [a](JaVaScRiPt:alert(1)) [a](java\tscript:alert(1)) [a](\x01javascript:alert(1))",
    f"[a](data:text/html,<script>{RUN}</script>) [a](vbscript:x) [a](blob:x) [a](file:///etc/passwd)",
    "[a](&#106;avascript:alert(1)) [a](javascript&colon;alert(1)) [a](//127.0.0.2:9/ran) [a](/ran) [a](#x)",
    f"![i]({ELSEWHERE}) ![i](/ran) ![i](data:image/svg+xml,<svg/onload=alert(1)>) ![{RUN}](x)",
    f"[![i]({ELSEWHERE})]({ELSEWHERE}) [r]: javascript:alert(1)\n[r][r] [r] <javascript:alert(1)>",
    'https://ok.example/"onmouseover="alert(1) http://ok.example/<script>alert(1)</script>',
    "[x](https://ok.example/'onclick='alert(1)) [x](http://a@127.0.0.2:9/ran \"t\" onclick=alert(1))",
    f'```"><script>{RUN}</script>\n<img src=/ran onerror=alert(1)>\n```',
    f"```html onload=alert(1) style=display:none\n{RUN}\n```\n~~~<b>x</b>\nx\n~~~",
    "| <img src=/ran> | [a](javascript:alert(1)) |\n|---|---|\n| <style>*{color:red}</style> | `<b>` |",
    "# <h1 onclick=alert(1)>x</h1>\n> <blockquote cite=/ran>\n1. <li style=color:red>\n- [ ] <input>",
    "{: onclick=alert(1) style=color:red } {#main .notice} :smile: $\\href{javascript:alert(1)}{x}$ [[/ran]]",
    "[javascript:alert(1)](https://label.example) [h](https://user:pw@host.example) HTTPS://UPPER.example",
)
UNICODE = (
    "\u202egnp.exe\u202c \u2066left\u2069 \u2067right\u2069 \u200b\ufeff\u2028\u2029 \x00\x1b[31m \ud7ff\uffff",
    "`\u202e code` \u202a**bold**\u202c [\u202etxt](https://ok.example/\u202ex) https://ok.example/\u202ey",
    "z\u0300\u0301" * 40 + " \U000e0041\U000e0042 \uff1cscript\uff1e\u02c2img\u203a \u17b4",
)
TOGETHER = ("".join(MARKUP), "\n".join(MARKDOWN), "".join(UNICODE))
"""The same as three texts."""
