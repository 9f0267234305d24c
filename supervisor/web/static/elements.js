// Making and changing elements. Text goes in as text, never as markup; a change that changes nothing touches nothing, so that a
// page with a hundred rows, refreshed each second, costs the browser next to nothing and keeps what is selected.

const SVG = "http://www.w3.org/2000/svg";

/** The element of an id; there must be one. */
export function byId(id) {
  const element = document.getElementById(id);
  if (!element) throw new Error(`no element #${id}`);
  return element;
}

/** An element with attributes and children; a child that is a string becomes text. */
export function make(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

/** The same in SVG. */
export function draw(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, String(value));
  }
  element.append(...children.filter((child) => child != null && child !== ""));
  return element;
}

/** Set an element's text, if it is another. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Set or remove (null) an attribute, if it is another. */
export function setAttribute(element, name, value) {
  if (value == null) {
    if (element.hasAttribute(name)) element.removeAttribute(name);
  } else if (element.getAttribute(name) !== String(value)) {
    element.setAttribute(name, String(value));
  }
}

/** Show or hide an element. */
export function show(element, shown) {
  if (element.hidden === shown) element.hidden = !shown;
}

/** Make the children of an element these, in this order, moving as few as need be. */
export function arrange(parent, wanted) {
  const keep = new Set(wanted);
  for (const child of [...parent.children]) if (!keep.has(child)) child.remove();
  let at = parent.firstElementChild;
  for (const child of wanted) {
    if (child === at) at = at.nextElementSibling;
    else parent.insertBefore(child, at);
  }
}

/** A pill with the word for a state, or without (null). */
export function pill() {
  const use = draw("use", {});
  const word = make("span");
  const element = make("span", { class: "pill" }, draw("svg", { class: "icon", "aria-hidden": "true" }, use), word);
  return {
    element,
    set(value) {
      setAttribute(element, "data-word", value);
      setAttribute(use, "href", value && `#icon-${value}`);
      setText(word, value ?? "");
    },
  };
}
