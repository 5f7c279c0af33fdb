// Elements without markup: whatever is shown is set as text.

export const $ = (id) => document.getElementById(id);

/** An element. `props` are properties; `class`, `aria-…`, `role`, `scope` and `data-…` are attributes. */
export function el(tag, props = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name in made && name !== "role") made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** A row of a table of bars: what it is, a bar from `from` to `to` (shares of the whole), and its number. */
export function barRow(name, note, kind, from, to, number) {
  const bar = el("span", { class: `bar ${kind}` });
  bar.style.marginInlineStart = `${100 * from}%`;
  bar.style.width = `${Math.max(0.4, 100 * (to - from))}%`;
  return el(
    "tr",
    { title: note },
    el("th", { scope: "row" }, name),
    el("td", { class: "track", "aria-hidden": "true" }, el("span", { class: "lane" }, bar)),
    el("td", { class: "number" }, number),
  );
}

export const milliseconds = (value) => `${value < 9.95 ? value.toFixed(1) : Math.round(value).toLocaleString("en")} ms`;

export const count = (value) => value.toLocaleString("en");

export const passages = (number) => `${count(number)} passage${number === 1 ? "" : "s"}`;
