// Views: the list of queries, one query, one training example, the self-influence list; routes.
const PAGE = 200; // entries that a list shows at once
const state = { view: 0, query: null, matches: [], shown: PAGE, links: new Map() };
const sections = ["overview", "query", "example", "list"];
const searchTexts = examples.map((example) =>
  example.space === "query"
    ? `${example.id}\n${example.ownId}\n${example.label}\n${example.text}`.toLowerCase()
    : "",
);

function clearInto(section, ...children) {
  section.replaceChildren(...children.filter((child) => child !== null && child !== ""));
}

function makeHead(number, ...more) {
  const example = examples[number];
  return make(
    "div",
    { className: "head" },
    makeThumb(number),
    make(
      "div",
      { className: "words" },
      make("h2", { tabindex: "-1" }, nameOf(example)),
      make(
        "div",
        { className: "tags" },
        makeLabel(example),
        example.ownId && make("span", { className: "quiet text" }, `id ${example.ownId}`),
      ),
      ...(example.text ? makeText([example.text], example.text.length) : []),
      ...more,
    ),
  );
}

// ---------------------------------------------------------------- the list of queries
function filterQueries() {
  const needle = byId("search").value.trim().toLowerCase();
  const label = byId("label").value;
  state.matches = views[state.view].queries
    .map(([query]) => query)
    .filter(
      (query) =>
        (!label || examples[query].label === label) &&
        (!needle || searchTexts[query].includes(needle)),
    );
  const total = views[state.view].queries.length;
  byId("matches").textContent =
    state.matches.length === total
      ? formatCount(total, total === 1 ? "query" : "querie")
      : `${state.matches.length.toLocaleString("en")} of ${total.toLocaleString("en")} queries`;
  state.shown = PAGE;
  listQueries();
}

function listQueries() {
  const entries = state.matches.slice(0, state.shown).map((query) => {
    const example = examples[query];
    const current = query === state.query ? "page" : null;
    return make(
      "li",
      {},
      make(
        "a",
        { href: queryLink(state.view, query), "aria-current": current, "data-query": query },
        makeThumb(query, true),
        make("span", { className: "line" }, make("b", {}, example.id), makeLabel(example)),
        example.text &&
          make("span", { className: "snippet", dir: "auto" }, example.text.slice(0, 120)),
      ),
    );
  });
  byId("queries").replaceChildren(...entries);
  byId("more-queries").hidden = state.matches.length <= state.shown;
}

function markQuery() {
  for (const link of byId("queries").querySelectorAll("a")) {
    if (Number(link.dataset.query) === state.query) {
      link.setAttribute("aria-current", "page");
      link.scrollIntoView({ block: "nearest" });
    } else link.removeAttribute("aria-current");
  }
}

function fillLabels() {
  const labels = [
    ...new Set(views[state.view].queries.map(([query]) => examples[query].label)),
  ].filter(Boolean);
  labels.sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
  byId("label").replaceChildren(
    make("option", { value: "" }, "all"),
    ...labels.map((label) => make("option", { value: label }, label)),
  );
  byId("label-field").classList.toggle("unseen", labels.length < 2);
}

function chooseView(view) {
  if (view === state.view && state.matches.length) return;
  state.view = view;
  byId("view").value = String(view);
  fillLabels();
  filterQueries();
}

function moveQuery(distance) {
  if (!state.matches.length) return;
  const at = state.matches.indexOf(state.query);
  const next = at < 0 ? 0 : at + distance;
  if (next < 0 || next >= state.matches.length) return;
  if (next >= state.shown) {
    state.shown = next + PAGE;
    listQueries();
  }
  state.query = state.matches[next]; // now: the next key may come before the route is followed
  location.hash = queryLink(state.view, state.query);
}

// ---------------------------------------------------------------- one query
function describeAgreement(query, rows) {
  const label = examples[query].label;
  if (!label) return null;
  const of = (proponent) => rows.filter((row) => row[1] === proponent && examples[row[0]].label);
  const texts = [
    [1, "proponents"],
    [0, "opponents"],
  ]
    .map(([proponent, noun]) => {
      const kind = of(proponent);
      return kind.length
        ? `${kind.filter((row) => examples[row[0]].label === label).length} of ${kind.length} ${noun}`
        : "";
    })
    .filter(Boolean);
  return texts.length
    ? make("p", { className: "quiet" }, `Same label as the query: ${texts.join(", ")}.`)
    : null;
}

function makeColumn(query, rows, proponent, largest) {
  const cards = rows
    .filter((row) => row[1] === proponent)
    .map(([train, , , score, parts = {}]) => {
      return makeCard(train, score, largest, {
        link: exampleLink(examples[train]),
        against: examples[query].label,
        parts,
      });
    });
  const [title, note] = proponent
    ? ["Proponents", "lowered the loss"]
    : ["Opponents", "raised the loss"];
  return make(
    "section",
    { className: proponent ? "pro" : "opp" },
    make("h3", {}, title, make("span", { className: "quiet" }, note)),
    cards.length
      ? make("ol", { className: "cards" }, ...cards)
      : make("p", { className: "quiet" }, `The table has no ${title.toLowerCase()} of this query.`),
  );
}

function makeLegend(rows) {
  const shaded = rows.some(
    (row) => row[4] && (row[4].word || row[4].token || row[4]["query-token"]),
  );
  if (!shaded) return null;
  return make(
    "p",
    { className: "legend quiet" },
    shade("this word lowered the loss", 1, 4, "shade"),
    shade("this word raised the loss", -1, 4, "shade"),
    "The stronger the colour, the more.",
  );
}

function showQuery(viewNumber, id) {
  chooseView(viewNumber);
  const query = numberOf.get(`query/${id}`);
  const view = views[viewNumber];
  if (query === undefined || !view.order.has(query)) return showMissing("query", `Query ${id}`);
  state.query = query;
  const rows = view.queries[view.order.get(query)][1];
  const largest = largestOf(rows.map((row) => row[3]));
  const at = state.matches.indexOf(query);
  const move = (distance, text) =>
    make(
      "button",
      {
        type: "button",
        disabled: at < 0 || !(at + distance in state.matches),
        on: { click: () => moveQuery(distance) },
      },
      text,
    );
  const steps = make(
    "div",
    { className: "steps" },
    move(-1, "\u2190 Previous"),
    move(1, "Next \u2192"),
  );
  const name = views.length > 1 ? make("p", { className: "quiet" }, `Scores: ${view.name}`) : null;
  clearInto(
    byId("query"),
    makeHead(query, name, describeAgreement(query, rows), steps),
    makeLegend(rows),
    make(
      "div",
      { className: "columns" },
      makeColumn(query, rows, 1, largest),
      makeColumn(query, rows, 0, largest),
    ),
  );
  showSection("query", nameOf(examples[query]));
  markQuery();
}

// ---------------------------------------------------------------- one training example
function queriesOf(viewNumber) {
  if (!state.links.has(viewNumber)) {
    const links = new Map();
    for (const [query, rows] of views[viewNumber].queries) {
      for (const [train, , , score] of rows) {
        if (!links.has(train)) links.set(train, []);
        links.get(train).push([query, score]);
      }
    }
    state.links.set(viewNumber, links);
  }
  return state.links.get(viewNumber);
}

function makeQueryColumn(viewNumber, number, sign) {
  const pairs = (queriesOf(viewNumber).get(number) ?? []).filter(
    ([, score]) => Math.sign(score) === sign,
  );
  pairs.sort((a, b) => Math.abs(b[1]) - Math.abs(a[1]));
  const largest = largestOf((queriesOf(viewNumber).get(number) ?? []).map((pair) => pair[1]));
  const cards = pairs
    .slice(0, 50)
    .map(([query, score]) =>
      makeCard(query, score, largest, {
        link: queryLink(viewNumber, query),
        against: examples[number].label,
      }),
    );
  const count =
    pairs.length > 50
      ? `the first 50 of ${pairs.length}`
      : formatCount(pairs.length, pairs.length === 1 ? "query" : "querie");
  return make(
    "section",
    { className: sign > 0 ? "pro" : "opp" },
    make(
      "h3",
      {},
      sign > 0 ? "Helped most" : "Hurt most",
      make("span", { className: "quiet" }, count),
    ),
    make("ol", { className: "cards" }, ...cards),
  );
}

function showExample(space, id) {
  const number = numberOf.get(`${space}/${id}`);
  if (number === undefined) return showMissing("example", `Example ${id}`);
  const facts = data.lists
    .flatMap((list) =>
      list.rows.map((row, at) => [list, row, at]).filter(([, row]) => row[0] === number),
    )
    .map(([list, [, score, loss], at]) =>
      make(
        "p",
        { className: "quiet" },
        `Self-influence ${formatScore(score)}, number ${(at + 1).toLocaleString("en")} of ${list.rows.length.toLocaleString("en")} (${list.name})${loss === null ? "" : `; loss ${formatLoss(loss)}`}`,
      ),
    );
  const columns = views
    .map((view, at) => [view, at])
    .filter(([, at]) => queriesOf(at).has(number))
    .flatMap(([view, at]) => [
      views.length > 1 ? make("p", { className: "quiet" }, `Scores: ${view.name}`) : "",
      make(
        "div",
        { className: "columns" },
        makeQueryColumn(at, number, 1),
        makeQueryColumn(at, number, -1),
      ),
    ]);
  const note = make(
    "p",
    { className: "quiet" },
    columns.length
      ? "Among the rows of this page: queries that do not list the example are missing."
      : "No query of this page lists this example.",
  );
  clearInto(byId("example"), makeHead(number, ...facts, views.length ? note : null), ...columns);
  showSection("example", nameOf(examples[number]));
}

// ---------------------------------------------------------------- routes and keys
function showMissing(section, name) {
  clearInto(byId(section), make("h2", { tabindex: "-1" }, `${name} is not on this page`));
  showSection(section, "not found");
}

let started = false;
function showSection(name, title, route = name) {
  for (const section of sections) byId(section).hidden = section !== name;
  document.body.dataset.route = route;
  document.title = `${title} · ${document.querySelector("h1").textContent}`;
  for (const link of document.querySelectorAll("[data-nav]")) {
    const current = link.dataset.nav === name;
    current ? link.setAttribute("aria-current", "page") : link.removeAttribute("aria-current");
  }
  const inList = document.activeElement?.closest?.("#queries, .controls");
  if (started && !inList) {
    byId(name).querySelector("h2")?.focus({ preventScroll: true });
  }
  if (started) window.scrollTo(0, 0);
}

function decode(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

function followRoute() {
  const [, name = "", first = "", ...rest] = location.hash.split("/");
  if (name === "query" && views[first]) showQuery(Number(first), decode(rest.join("/")));
  else if (name === "queries" && views.length) {
    const query = state.query ?? views[state.view].queries[0][0];
    showQuery(state.view, examples[query].id);
    document.body.dataset.route = "queries";
  } else if (name === "example") showExample(first, decode(rest.join("/")));
  else if (name === "list" && data.lists[first]) showList(Number(first));
  else showSection("overview", "Overview");
  started = true;
}

function handleKey(event) {
  const typing = event.target.closest?.("input, select, textarea");
  if (event.key === "Escape" && event.target.id === "search") {
    event.target.value = "";
    filterQueries();
    event.target.blur();
    return;
  }
  if (event.key === "ArrowDown" && event.target.id === "search") {
    byId("queries").querySelector("a")?.focus();
    event.preventDefault();
    return;
  }
  if (typing || event.altKey || event.ctrlKey || event.metaKey || !views.length) return;
  if (event.key === "/") {
    if (!byId("search").offsetParent) {
      location.hash = "#/queries";
      document.body.dataset.route = "queries"; // now: the next key may belong to the search
    }
    byId("search").focus();
    event.preventDefault();
  } else if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
    moveQuery(event.key === "ArrowRight" ? 1 : -1);
    event.preventDefault();
  } else if (
    (event.key === "ArrowDown" || event.key === "ArrowUp") &&
    event.target.closest?.("#queries")
  ) {
    const item = event.target.closest("li");
    const next = event.key === "ArrowDown" ? item.nextElementSibling : item.previousElementSibling;
    (next ? next.querySelector("a") : event.key === "ArrowUp" ? byId("search") : null)?.focus();
    event.preventDefault();
  }
}

if (views.length) {
  byId("search").addEventListener("input", filterQueries);
  byId("label").addEventListener("change", filterQueries);
  byId("view").addEventListener("change", (event) => {
    const view = Number(event.target.value);
    const query = views[view].order.has(state.query) ? state.query : views[view].queries[0][0];
    location.hash = queryLink(view, query);
  });
  byId("more-queries").addEventListener("click", () => {
    state.shown += PAGE;
    listQueries();
  });
  chooseView(0);
}
byId("skip").addEventListener("click", (event) => {
  event.preventDefault();
  byId("main").focus();
});
document.addEventListener("keydown", handleKey);
window.addEventListener("hashchange", followRoute);
followRoute();
