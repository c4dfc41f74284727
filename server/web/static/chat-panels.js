/** The panels beside the conversation; where there is no room beside it they lie over it. */

const NARROW = matchMedia("(max-width: 60rem)");
const OPEN = "inferneo.open-panels";

export class Panels {
  #panels; // name: {root, draw, opener}
  #main;

  /** `panels`: of each name its {root, draw}; `openers` gives the button of a name. */
  constructor(panels, main) {
    this.#panels = panels;
    this.#main = main;
    for (const [name, { root }] of Object.entries(panels)) {
      root.addEventListener("keydown", (event) => {
        if (event.key !== "Escape" || !NARROW.matches) return;
        event.stopPropagation();
        this.close(name);
      });
    }
    const kept = (localStorage.getItem(OPEN) ?? "").split(" ");
    if (!NARROW.matches) for (const name of kept) if (name in panels) this.#set(name, true);
    NARROW.addEventListener("change", () => {
      if (NARROW.matches) for (const name of Object.keys(panels)) this.#set(name, false);
      else main.inert = false;
    });
  }

  isOpen(name) {
    return !this.#panels[name].root.hidden;
  }

  toggle(name) {
    if (this.isOpen(name)) return this.close(name);
    this.open(name);
  }

  open(name) {
    if (NARROW.matches) for (const other of Object.keys(this.#panels)) this.#set(other, false);
    this.#set(name, true);
    this.#keep();
    this.#panels[name].root.querySelector("button, input, textarea").focus();
  }

  close(name) {
    this.#set(name, false);
    this.#keep();
    document.querySelector(`[aria-controls="${name}"]`)?.focus();
  }

  /** Draw what is open anew. */
  draw() {
    for (const { root, draw } of Object.values(this.#panels)) if (!root.hidden) draw();
  }

  #set(name, open) {
    const { root, draw } = this.#panels[name];
    root.hidden = !open;
    if (open) draw();
    document.querySelector(`[aria-controls="${name}"]`)?.setAttribute("aria-expanded", String(open));
    this.#main.inert = NARROW.matches && Object.keys(this.#panels).some((each) => this.isOpen(each));
  }

  #keep() {
    const open = Object.keys(this.#panels).filter((name) => this.isOpen(name));
    if (!NARROW.matches) localStorage.setItem(OPEN, open.join(" "));
  }
}
