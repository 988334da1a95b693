// Data, small helpers, theme. The scripts of this folder become one, in the order of page.py.
const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);
const examples = data.examples.map(([space, id, label = "", text = "", ownId = ""]) => ({
  space,
  id,
  label,
  text,
  ownId,
}));
const numberOf = new Map(
  examples.map((example, number) => [`${example.space}/${example.id}`, number]),
);
const views = data.views.map((view) => ({
  ...view,
  order: new Map(view.queries.map(([query], at) => [query, at])),
}));
let pictures = null; // parsed at the first use: it may be large

// An element. Texts of the data only ever become text nodes.
function make(tag, properties = {}, ...children) {
  const svg = ["svg", "rect", "line", "polyline", "title"].includes(tag);
  const element = svg
    ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "on")
      for (const [event, handle] of Object.entries(value)) element.addEventListener(event, handle);
    else
      element.setAttribute(
        name === "className" ? "class" : name,
        value === true ? "" : String(value),
      );
  }
  element.append(
    ...children.filter((child) => child !== null && child !== undefined && child !== ""),
  );
  return element;
}

// Four digits; a minus sign as typesetters write it.
function formatScore(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  const digits =
    size >= 1e5 || size < 1e-4
      ? size.toExponential(2)
      : size.toLocaleString("en", { minimumSignificantDigits: 4, maximumSignificantDigits: 4 });
  return `${value < 0 ? "\u2212" : "+"}${digits}`;
}
const formatCount = (count, noun) =>
  `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
const signOf = (value) => (value < 0 ? "opp" : "pro");

function pictureOf(number) {
  pictures ??= JSON.parse(byId("pictures").textContent);
  return pictures[number];
}

function nameOf(example) {
  if (example.space === "group") return `Group ${example.id}`;
  if (example.space === "query")
    return example.id === "all" ? "All queries" : `Query ${example.id}`;
  return `Example ${example.id}`;
}

function describePicture(example) {
  return `Picture of ${nameOf(example).toLowerCase()}${example.label ? `, label ${example.label}` : ""}`;
}

function makeThumb(number, decorative = false) {
  const source = pictureOf(number);
  if (!source) return null;
  const exact = source.startsWith("data:image/png");
  return make("img", {
    className: exact ? "thumb exact" : "thumb",
    src: source,
    alt: decorative ? "" : describePicture(examples[number]),
    loading: "lazy",
    decoding: "async",
  });
}

function makeLabel(example) {
  return example.label
    ? make(
        "span",
        { className: "label", dir: "auto" },
        make("span", { className: "for-readers" }, "label "),
        example.label,
      )
    : null;
}

const exampleLink = (example) => `#/example/${example.space}/${encodeURIComponent(example.id)}`;
const queryLink = (view, number) => `#/query/${view}/${encodeURIComponent(examples[number].id)}`;

// The browser may refuse storage to a local file.
function readTheme() {
  try {
    return localStorage.getItem("influence-theme") || "auto";
  } catch {
    return "auto";
  }
}
function showTheme(theme) {
  document.documentElement.dataset.theme = theme;
  byId("theme").textContent = `Theme: ${theme}`;
  try {
    localStorage.setItem("influence-theme", theme);
  } catch {
    /* only this page has it */
  }
}
byId("theme").addEventListener("click", () => {
  const themes = ["auto", "light", "dark"];
  showTheme(themes[(themes.indexOf(document.documentElement.dataset.theme) + 1) % themes.length]);
});
showTheme(["auto", "light", "dark"].includes(readTheme()) ? readTheme() : "auto");
