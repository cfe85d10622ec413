// Numbers as people read them, and elements. Every text reaches the page as a text node, and in
// <bdi>, where others share its line: a model's name may be hostile, and turn around what stands
// beside it.

export const $ = (id) => document.getElementById(id);
export const whole = new Intl.NumberFormat("en");
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
const clock = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const day = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short" });
export const full = new Intl.DateTimeFormat("en-GB", { dateStyle: "medium", timeStyle: "medium" });
const relative = new Intl.RelativeTimeFormat("en", { numeric: "auto", style: "narrow" });

export function short(number) {
  return Math.abs(number) < 10000 ? whole.format(number) : compact.format(number);
}

export function usd(amount) {
  if (amount === 0) return "$0";
  const size = Math.abs(amount);
  const digits = size >= 1 ? 2 : size >= 0.01 ? 3 : 5;
  const said = size < 0.00001 ? "<$0.00001" : `$${size.toFixed(digits)}`;
  return amount < 0 ? `\u2212${said}` : said;
}

export function seconds(value) {
  if (value < 1) return `${Math.round(value * 1000)} ms`;
  return value < 100 ? `${value.toFixed(1)} s` : `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
}

export function when(stamp) {
  const date = new Date(stamp * 1000);
  const today = date.toDateString() === new Date().toDateString();
  return today ? clock.format(date) : `${day.format(date)} ${clock.format(date).slice(0, 5)}`;
}

export function ago(stamp) {
  const past = Date.now() / 1000 - stamp;
  if (past < 10) return "now";
  if (past < 60) return relative.format(-Math.round(past), "second");
  if (past < 3600) return relative.format(-Math.round(past / 60), "minute");
  if (past < 86400) return relative.format(-Math.round(past / 3600), "hour");
  return relative.format(-Math.round(past / 86400), "day");
}

// --- elements

export function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

export function svg(tag, properties, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(properties)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

export const things = (count, one, many = `${one}s`) => `${whole.format(count)} ${count === 1 ? one : many}`;
export const none = (title) => el("span", { class: "none", title }, "–");
export const time = (stamp, text) =>
  el("time", { datetime: new Date(stamp * 1000).toISOString(), title: full.format(stamp * 1000) }, text);
export const number = (value, title) =>
  el("td", { class: "n" }, value === null ? none(title) : whole.format(value));
export const text = (value, more = "") =>
  el("td", { class: `text ${more}`.trim(), title: value }, value === null ? none("not known") : value);

export function money(amount, title) {
  return el("td", { class: "n" }, amount === null ? none(title) : el("span", { title: `$${amount}` }, usd(amount)));
}

export function fill(table, rows) {
  const held = document.activeElement?.dataset?.id;
  table.tBodies[0].replaceChildren(...rows);
  if (held !== undefined) {
    for (const button of table.querySelectorAll("button")) {
      if (button.dataset.id === held) button.focus({ preventScroll: true });
    }
  }
}
