// One panel: takes HTML from the server, and changes only what is different, so that focus, scroll position and
// selected text survive. Tells the server what was clicked, typed and sent (`data-do`); moves what moved
// (`data-flip`); opens dialogs as the browser's own. The HTML has been escaped where it was made.

const calm = matchMedia("(prefers-reduced-motion: reduce)");

function same(old, next) {
  return (
    old.nodeType === next.nodeType &&
    old.nodeName === next.nodeName &&
    (old.dataset?.key ?? "") === (next.dataset?.key ?? "")
  );
}

function morph(old, next) {
  const keyed = new Map();
  for (const child of old.children) if (child.dataset.key) keyed.set(child.dataset.key, child);
  let here = old.firstChild;
  for (const wanted of [...next.childNodes]) {
    const key = wanted.dataset?.key;
    const found = key ? keyed.get(key) : here;
    if (!found || !same(found, wanted)) {
      old.insertBefore(wanted, here);
      continue;
    }
    if (found === here) here = here.nextSibling;
    else old.insertBefore(found, here);
    if (found.nodeType === Node.ELEMENT_NODE) {
      attributes(found, wanted);
      morph(found, wanted);
    } else if (found.nodeValue !== wanted.nodeValue) found.nodeValue = wanted.nodeValue;
  }
  while (here) {
    const gone = here;
    here = here.nextSibling;
    if (gone.nodeName === "DIALOG") gone.close(); // gives the focus back
    gone.remove();
  }
}

function attributes(old, next) {
  for (const { name } of [...old.attributes]) {
    if (!next.hasAttribute(name) && !["open", "data-copied"].includes(name)) old.removeAttribute(name);
  }
  for (const { name, value } of next.attributes) {
    if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  }
  if (old.type === "range" && old !== document.activeElement) old.value = next.getAttribute("value");
}

function places(root) {
  const found = new Map();
  for (const one of root.querySelectorAll("[data-flip]")) found.set(one.dataset.flip, one.getBoundingClientRect());
  return found;
}

function animate(root, before) {
  if (calm.matches || !before.size) return;
  for (const one of root.querySelectorAll("[data-flip]")) {
    const from = before.get(one.dataset.flip);
    const to = one.getBoundingClientRect();
    if (!from) one.animate([{ opacity: 0, transform: "scale(.6)" }, {}], { duration: 450, easing: "ease-out" });
    else if (Math.abs(from.x - to.x) + Math.abs(from.y - to.y) > 2) {
      const move = `translate(${from.x - to.x}px, ${from.y - to.y}px)`;
      one.animate([{ transform: move }, {}], { duration: 700, easing: "cubic-bezier(.3,.7,.2,1)" });
    }
  }
}

function copy(button) {
  const source = document.getElementById(button.dataset.copy);
  const done = () => {
    button.dataset.copied = "1";
    setTimeout(() => delete button.dataset.copied, 1500);
  };
  const select = () => getSelection().selectAllChildren(source); // where the clipboard is not ours to write
  if (navigator.clipboard) navigator.clipboard.writeText(source.textContent).then(done, select);
  else select();
}

function theme() {
  const dark = document.documentElement.dataset.theme
    ? document.documentElement.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = dark ? "light" : "dark";
  localStorage.setItem("shoal-theme", document.documentElement.dataset.theme);
}

export default {
  template: `<component :is="tag"></component>`,
  props: { html: String, tag: String },
  mounted() {
    this.render();
    const root = this.$el;
    root.addEventListener("click", (event) => {
      const button = event.target.closest("[data-do],[data-copy],[data-theme-switch]");
      if (!button || ["FORM", "INPUT", "SELECT"].includes(button.tagName)) return;
      if (button.hasAttribute("data-theme-switch")) return theme();
      if (button.dataset.copy) return copy(button);
      this.$emit("do", { ...button.dataset });
    });
    root.addEventListener("submit", (event) => {
      const form = event.target;
      if (!form.dataset.do) return; // the browser's own, like signing out
      event.preventDefault();
      this.$emit("do", { ...form.dataset, form: Object.fromEntries(new FormData(form)) });
    });
    let typing = 0, told = 0;
    root.addEventListener("input", (event) => {
      const field = event.target;
      if (!field.dataset.do) return;
      const word = { ...field.dataset, value: field.value }; // as it is now: a redraw may set it back before it is told
      const tell = () => this.$emit("do", word);
      if (field.type === "range" && Date.now() - told > 150) return (told = Date.now()), tell(); // while it is dragged
      clearTimeout(typing);
      typing = setTimeout(tell, 150);
    });
    root.addEventListener("cancel", (event) => {
      event.preventDefault(); // Escape: the server closes it
      this.$emit("do", { do: "close" });
    }, true);
  },
  updated() {
    this.render();
  },
  methods: {
    render() {
      const next = document.createElement("template");
      next.innerHTML = this.html;
      const before = places(this.$el);
      morph(this.$el, next.content);
      animate(this.$el, before);
      for (const dialog of this.$el.querySelectorAll("dialog:not([open])")) dialog.showModal();
    },
  },
};
