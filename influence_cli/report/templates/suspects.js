// The self-influence list: threshold, class filter, copy.
const formatLoss = (loss) => formatScore(loss).replace("+", "");

// 0 to 1000 on the slider: the number of examples grows by equal factors.
const countAt = (position, total) => Math.max(1, Math.round(total ** (position / 1000)));
const positionOf = (count, total) =>
  total > 1 ? Math.round((1000 * Math.log(Math.max(1, count))) / Math.log(total)) : 1000;

// Four digits, not above the score: the example itself stays on the list.
function roundDown(score) {
  if (!score) return "0";
  const unit = 10 ** (Math.floor(Math.log10(Math.abs(score))) - 3);
  const rounded = Number((Math.floor(score / unit) * unit).toPrecision(5));
  return String(rounded <= score ? rounded : score);
}

async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = make("textarea", { "aria-label": "ids" });
    area.value = text;
    document.body.append(area);
    area.select();
    const copied = document.execCommand("copy"); // where a page may not use the clipboard
    area.remove();
    return copied;
  }
}

function makeChoice(title, options) {
  const select = make(
    "select",
    {},
    ...options.map(([value, text]) => make("option", { value }, text)),
  );
  return [make("label", { className: "field" }, title, select), select];
}

function showList(listNumber) {
  const list = data.lists[listNumber];
  const sorted = list.rows.map((row) => row[1]).sort((a, b) => b - a);
  const labels = [...new Set(list.rows.map((row) => examples[row[0]].label))]
    .filter(Boolean)
    .sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
  const hasLoss = list.rows.some((row) => row[2] !== null);
  const [tableField, tableSelect] = makeChoice(
    "Table",
    data.lists.map((entry, at) => [at, entry.name]),
  );
  const [labelField, labelSelect] = makeChoice("Label", [
    ["", "all"],
    ...labels.map((label) => [label, label]),
  ]);
  const [sortField, sortSelect] = makeChoice("Sort by", [
    ["1", "self-influence"],
    ...(hasLoss ? [["2", "loss"]] : []),
  ]);
  const slider = make("input", {
    type: "range",
    min: 0,
    max: 1000,
    step: 1,
    "aria-label": "Smallest self-influence",
  });
  const threshold = make("input", { type: "number", step: "any" });
  const copyButton = make("button", { type: "button" }, "Copy ids");
  const status = make("p", { className: "quiet", role: "status" });
  const cards = make("ol", { className: "cards grid" });
  const more = make("button", { type: "button", className: "more", hidden: true }, "Show more");
  const largest = largestOf(sorted);
  let [matches, shown] = [[], PAGE];

  function fill() {
    const entries = matches.slice(0, shown).map(([number, score, loss]) => {
      const note =
        loss === null ? [] : [make("span", { className: "quiet" }, `loss ${formatLoss(loss)}`)];
      return makeCard(number, score, largest, { link: exampleLink(examples[number]), notes: note });
    });
    cards.replaceChildren(...entries);
    more.hidden = matches.length <= shown;
  }
  function filter() {
    const lowest = threshold.value === "" ? -Infinity : Number(threshold.value);
    const column = Number(sortSelect.value);
    matches = list.rows.filter(
      (row) =>
        row[1] >= lowest && (!labelSelect.value || examples[row[0]].label === labelSelect.value),
    );
    matches.sort((a, b) => (b[column] ?? -Infinity) - (a[column] ?? -Infinity));
    status.textContent = `${matches.length.toLocaleString("en")} of ${formatCount(list.rows.length, "example")}`;
    slider.setAttribute(
      "aria-valuetext",
      `at least ${threshold.value}, ${formatCount(matches.length, "example")}`,
    );
    shown = PAGE;
    fill();
  }
  slider.addEventListener("input", () => {
    threshold.value = roundDown(sorted[countAt(Number(slider.value), sorted.length) - 1]);
    filter();
  });
  threshold.addEventListener("input", () => {
    slider.value = String(
      positionOf(sorted.filter((score) => score >= Number(threshold.value)).length, sorted.length),
    );
    filter();
  });
  labelSelect.addEventListener("change", filter);
  sortSelect.addEventListener("change", filter);
  tableSelect.value = String(listNumber);
  tableSelect.addEventListener("change", () => {
    location.hash = `#/list/${tableSelect.value}`;
  });
  more.addEventListener("click", () => {
    shown += PAGE;
    fill();
  });
  copyButton.addEventListener("click", async () => {
    const ids = matches.map((row) => examples[row[0]].id);
    const copied = await copyText(`${ids.join("\n")}\n`);
    status.textContent = copied
      ? `${formatCount(ids.length, "id")} copied`
      : "The browser does not let this page copy";
  });
  const filters = make(
    "div",
    { className: "panel filters" },
    make("label", { className: "field wide" }, "Threshold", slider),
    make("label", { className: "field" }, "Self-influence at least", threshold),
    labels.length > 1 ? labelField : null,
    hasLoss ? sortField : null,
    data.lists.length > 1 ? tableField : null,
    copyButton,
  );
  clearInto(
    byId("list"),
    make("h2", { tabindex: "-1" }, "Self-influence"),
    make(
      "p",
      {},
      "How much an example influences its own prediction. Wrong labels and atypical examples come first.",
    ),
    filters,
    status,
    cards,
    more,
  );
  slider.value = String(positionOf(Math.min(sorted.length, 50), sorted.length));
  slider.dispatchEvent(new Event("input"));
  showSection("list", "Self-influence");
}
