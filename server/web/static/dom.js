/** Elements in one call: h("button", {type: "button", onclick}, "Send"). Texts go through `inOrder`. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  set(element, attributes);
  const given = children.filter((child) => child !== null && child !== undefined);
  element.append(...given.map((child) => (typeof child === "string" ? inOrder(child) : child)));
  return element;
}

/** The same for SVG, whose elements live in a namespace of their own. */
export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  set(element, attributes);
  element.append(...children);
  return element;
}

/** Attributes by name; what begins with "on" is a listener, true is an empty attribute, false none. */
export function set(element, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value === false || value === null || value === undefined) element.removeAttribute(name);
    else element.setAttribute(name, value);
  }
}

/** The element of this id, which the page has. */
export function byId(id) {
  return document.getElementById(id);
}

/** Put a text on the clipboard; the older way is for pages that came by plain HTTP from elsewhere. */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const field = h("textarea", { readonly: true });
    const focused = document.activeElement;
    field.value = text;
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
    focused?.focus();
  }
}

/** A button that copies what `text()` gives, and says so. */
export function copyButton(text, label = "Copy", attributes = {}) {
  const button = h("button", { type: "button", class: "small quiet", ...attributes }, label);
  button.addEventListener("click", async () => {
    await copyText(text());
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = label), 1500);
  });
  return button;
}

/**
 * A text whose characters stay in their order.
 *
 * The controls that reverse it (U+202A to U+202E, U+2066 to U+2069) would have the page show what the
 * text does not say; they become U+FFFD, as on a terminal.
 */
export function inOrder(text) {
  return text.replace(/[\u202a-\u202e\u2066-\u2069]/g, "\ufffd");
}
