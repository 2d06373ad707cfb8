// Elements and numbers.  Text from the gateway only ever becomes text nodes and attribute values.

export const $ = (selector, root = document) => root.querySelector(selector);

const SVG = "http://www.w3.org/2000/svg";

function dressed(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child != null));
  return node;
}

/** A new element; `children` are nodes or text. */
export const h = (tag, attributes = {}, ...children) =>
  dressed(document.createElement(tag), attributes, children);

export const svg = (tag, attributes = {}, ...children) =>
  dressed(document.createElementNS(SVG, tag), attributes, children);

/** Change a node's text only when it differs: nothing is laid out or read again without need. */
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function mark(node, name, value) {
  if (value === false || value == null) node.removeAttribute(name);
  else if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value);
}

/** Make a parent's children those of `items`, in order, keeping the nodes (and the focus) of those that stay. */
export function keyed(parent, items, key, make, update) {
  parent.known ??= new Map();
  const wanted = new Map(items.map((item) => [String(key(item)), item]));
  for (const [name, node] of parent.known) {
    if (!wanted.has(name)) {
      node.remove();
      parent.known.delete(name);
    }
  }
  let at = parent.firstElementChild;
  for (const [name, item] of wanted) {
    let node = parent.known.get(name);
    if (!node) parent.known.set(name, (node = make(item)));
    update(node, item);
    if (node === at) at = at.nextElementSibling;
    else parent.insertBefore(node, at);
  }
}

// -- numbers ---------------------------------------------------------------------------------------

const formats = [0, 1, 2].map(
  (digits) => new Intl.NumberFormat("en", { maximumFractionDigits: digits, minimumFractionDigits: digits }),
);
const short = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
const clock = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" });

export const NONE = "–";
export const count = (n) => (n == null ? NONE : formats[0].format(n));
export const compact = (n) => (n == null ? NONE : n < 10_000 ? formats[0].format(n) : short.format(n));
export const decimal = (n) => (n == null ? NONE : formats[n >= 100 ? 0 : n >= 10 || n === 0 ? 1 : 2].format(n));
export const percent = (share) => (share == null ? NONE : `${formats[0].format(100 * share)} %`);
export const time = (unix) => clock.format(new Date(1000 * unix));

/** Seconds as [number, unit]. */
export function span(seconds) {
  if (seconds == null) return [NONE, ""];
  if (seconds === 0) return ["0", "s"];
  if (seconds < 0.9995) return [formats[seconds < 0.00995 ? 1 : 0].format(1000 * seconds), "ms"];
  if (seconds < 120) return [formats[seconds < 9.995 ? 2 : 1].format(seconds), "s"];
  if (seconds < 7200) return [formats[1].format(seconds / 60), "min"];
  return [formats[1].format(seconds / 3600), "h"];
}
/** How long something has been going on: whole seconds, then minutes and hours. */
export const age = (seconds) => (seconds < 120 ? `${formats[0].format(seconds)} s` : duration(seconds));
export const duration = (seconds) => span(seconds).join(" ").trim();
