// Cards: one example with its score, its text and the parts of its score.
const LONG_TEXT = 420; // characters from which a text is clipped
const MOST_LAYERS = 8;
const FAINT = 20; // percent of the strongest colour, below which a word is not underlined
const MOST_WORDS = 12; // that have no place in the text

function largestOf(values) {
  return values.reduce((largest, value) => Math.max(largest, Math.abs(value)), 0) || 1;
}

function sumParts(parts) {
  const sums = new Map();
  for (const [name, score] of parts) sums.set(name, (sums.get(name) ?? 0) + score);
  return sums;
}

function shade(text, score, largest, title) {
  if (!score) return document.createTextNode(text);
  const element = make(
    "span",
    { className: `shade ${signOf(score)}`, title: `${title}: ${formatScore(score)}` },
    text,
  );
  const share = 100 * Math.sqrt(Math.abs(score) / largest);
  if (share < FAINT) element.classList.add("faint");
  element.style.backgroundColor = `color-mix(in srgb, var(--${signOf(score)}-shade) ${share.toFixed(1)}%, transparent)`;
  return element;
}

// The text with each word shaded that has a part of the score, and the words that the text lacks.
function shadeWords(text, parts) {
  const sums = sumParts(parts);
  const largest = largestOf([...sums.values()]);
  const words = new Set(text.split(/\s+/u));
  const nodes = text
    .split(/(\s+)/u)
    .map((piece) => (sums.has(piece) ? shade(piece, sums.get(piece), largest, piece) : piece));
  const rest = [...sums]
    .filter(([word]) => !words.has(word))
    .sort((a, b) => Math.abs(b[1]) - Math.abs(a[1]));
  return [nodes, rest];
}

// Tokens in the order of their positions: `POSITION:TEXT`. `-` is what has no position.
function shadeTokens(parts) {
  const tokens = [];
  const rest = [];
  for (const [name, score] of sumParts(parts)) {
    const match = /^(\d+):(.*)$/su.exec(name);
    if (match) tokens.push([Number(match[1]), match[2], score]);
    else rest.push([name, score]);
  }
  tokens.sort((a, b) => a[0] - b[0]);
  const largest = largestOf(tokens.map((token) => token[2]));
  const marked = tokens.some(([, text]) => /^[\u0120\u2581]/u.test(text)); // a mark of a space
  const nodes = tokens.flatMap(([position, text, score], at) => {
    const shown = text
      .replace(/^[\u0120\u2581]/u, " ")
      .replace(/\u010a/gu, "\n")
      .replace(/^##/u, "");
    const space = at && !marked && !text.startsWith("##") && !/^\s|\s$/u.test(shown) ? " " : "";
    return [space, shade(shown, score, largest, `${position}, ${text}`)];
  });
  return [nodes, rest];
}

function listRest(rest) {
  if (!rest.length) return null;
  if (rest.length === 1 && rest[0][0] === "-")
    return make("p", { className: "quiet" }, `Without a position: ${formatScore(rest[0][1])}`);
  const shown = rest.slice(0, MOST_WORDS).map(([word, score]) => `${word} ${formatScore(score)}`);
  const more = rest.length > MOST_WORDS ? ` and ${rest.length - MOST_WORDS} more` : "";
  return make("p", { className: "quiet text" }, `Not in the text: ${shown.join(", ")}${more}`);
}

function makeText(nodes, length) {
  const text = make("p", { className: "text", dir: "auto" }, ...nodes);
  if (length <= LONG_TEXT) return [text];
  text.classList.add("clipped");
  const button = make(
    "button",
    { type: "button", "aria-expanded": "false" },
    "Show the whole text",
  );
  button.addEventListener("click", () => {
    const clipped = text.classList.toggle("clipped");
    button.textContent = clipped ? "Show the whole text" : "Show less";
    button.setAttribute("aria-expanded", String(!clipped));
  });
  return [text, button];
}

function makeTexts(example, parts) {
  const words = parts.token
    ? shadeTokens(parts.token)
    : parts.word
      ? shadeWords(example.text, parts.word)
      : null;
  const [nodes, rest] = words ?? [[example.text], []];
  const length = parts.token ? parts.token.length * 5 : example.text.length;
  const elements = nodes.some((node) => node !== "") ? makeText(nodes, length) : [];
  return [...elements, listRest(rest), makeQueryTokens(parts["query-token"])];
}

function makeQueryTokens(parts) {
  if (!parts) return null;
  const [nodes, rest] = shadeTokens(parts);
  return make(
    "div",
    { className: "part" },
    make("p", { className: "part-title" }, "Through which words of the query"),
    ...makeText(nodes, parts.length * 5),
    listRest(rest),
  );
}

// Bars of the parts and the line of their running sum, over training.
function plotTime(parts, unit) {
  const points = [...sumParts(parts)]
    .map(([name, score], at) => {
      const number = Number(name.replace(/^\D+/u, ""));
      return [Number.isFinite(number) && name !== "" ? number : at, score, name];
    })
    .sort((a, b) => a[0] - b[0]);
  let running = 0;
  const sums = points.map(([, score]) => (running += score));
  const low = Math.min(0, ...sums, ...points.map((point) => point[1]));
  const high = Math.max(0, ...sums, ...points.map((point) => point[1]));
  const [width, height, edge] = [300, 60, 4];
  const first = points[0][0];
  const span = points.at(-1)[0] - first || 1;
  const x = (step) => edge + ((step - first) / span) * (width - 2 * edge);
  const y = (score) => height - edge - ((score - low) / (high - low || 1)) * (height - 2 * edge);
  const bar = Math.max(1.5, Math.min(8, (width / points.length) * 0.6));
  const bars = points.map(([step, score, name]) =>
    make(
      "rect",
      {
        className: `${signOf(score)}-fill`,
        x: (x(step) - bar / 2).toFixed(2),
        width: bar.toFixed(2),
        y: Math.min(y(0), y(score)).toFixed(2),
        height: Math.max(0.75, Math.abs(y(score) - y(0))).toFixed(2),
      },
      make("title", {}, `${unit} ${name}: ${formatScore(score)}`),
    ),
  );
  const line = make("polyline", {
    className: "line",
    points: points.map(([step], at) => `${x(step).toFixed(2)},${y(sums[at]).toFixed(2)}`).join(" "),
  });
  const strongest = points.reduce((best, point) =>
    Math.abs(point[1]) > Math.abs(best[1]) ? point : best,
  );
  const caption = `${unit} ${points[0][2]} to ${points.at(-1)[2]}; strongest at ${strongest[2]} (${formatScore(strongest[1])})`;
  return make(
    "div",
    { className: "part" },
    make("p", { className: "part-title" }, "Over training: ", caption),
    make(
      "svg",
      {
        className: "plot",
        viewBox: `0 0 ${width} ${height}`,
        preserveAspectRatio: "none",
        role: "img",
        "aria-label": `Influence over training: ${caption}; running sum ${formatScore(running)}`,
      },
      make("line", { className: "axis", x1: 0, x2: width, y1: y(0), y2: y(0) }),
      ...bars,
      line,
    ),
  );
}

function plotLayers(parts) {
  const layers = [...sumParts(parts)].sort((a, b) => Math.abs(b[1]) - Math.abs(a[1]));
  const largest = largestOf(layers.map((layer) => layer[1]));
  const rows = layers.slice(0, MOST_LAYERS).map(([name, score]) => {
    const [left, right] = [make("i", { className: "left" }), make("i", { className: "right" })];
    (score < 0 ? left : right).style.width = `${(100 * Math.abs(score)) / largest}%`;
    return make(
      "li",
      { className: "layer" },
      make("span", { className: "name" }, name),
      make("span", { className: "track", "aria-hidden": "true" }, left, right),
      make("span", { className: "number" }, formatScore(score)),
    );
  });
  const more = layers.length - MOST_LAYERS;
  return make(
    "div",
    { className: "part" },
    make(
      "p",
      { className: "part-title" },
      `By layer${more > 0 ? `: the strongest ${MOST_LAYERS} of ${layers.length}` : ""}`,
    ),
    make("ul", { className: "layers" }, ...rows),
  );
}

function makeParts(parts) {
  return [
    parts.step && plotTime(parts.step, "step"),
    parts.checkpoint && plotTime(parts.checkpoint, "checkpoint"),
    parts.layer && plotLayers(parts.layer),
  ].filter(Boolean);
}

function makeBar(score, largest) {
  const length = make("i");
  length.style.width = `${((100 * Math.abs(score)) / largest).toFixed(2)}%`;
  return make("div", { className: `bar ${signOf(score)}`, "aria-hidden": "true" }, length);
}

function compareLabels(label, other) {
  if (!label || !other) return null;
  return label === other
    ? make("span", { className: "agree" }, "\u2713 same label")
    : make("span", { className: "differ" }, "\u2260 other label");
}

// `link`: where the card's name leads. `against`: the label to compare with. `notes`: more tags.
function makeCard(number, score, largest, { link, against = "", parts = {}, notes = [] }) {
  const example = examples[number];
  return make(
    "li",
    { className: "card" },
    make(
      "div",
      { className: "card-head" },
      makeThumb(number),
      make(
        "div",
        { className: "names" },
        make("a", { href: link }, nameOf(example)),
        make(
          "div",
          { className: "tags" },
          makeLabel(example),
          compareLabels(example.label, against),
          example.ownId && make("span", { className: "quiet text" }, `id ${example.ownId}`),
          ...notes,
        ),
      ),
      make("span", { className: `score ${signOf(score)}-text` }, formatScore(score)),
    ),
    makeBar(score, largest),
    ...makeTexts(example, parts),
    ...makeParts(parts),
  );
}
