"use strict";
// Two views: the list of latents (#/) and one latent (#/layer/latent). Data come as scripts, for file:// pages
// may not fetch: each calls clt.add(name, data). Texts are only ever set as text, never as HTML.

const clt = (() => {
  const waiting = new Map();
  const held = new Map();
  return {
    add(name, data) {
      held.set(name, data);
      waiting.get(name)?.done(data);
      if (name === "run") start(data);
    },
    // A promise of what data/<name>.js holds.
    load(name) {
      if (held.has(name)) return Promise.resolve(held.get(name));
      if (!waiting.has(name)) {
        const entry = {};
        entry.promise = new Promise((done, fail) => Object.assign(entry, { done, fail }));
        waiting.set(name, entry);
        const script = document.createElement("script");
        script.src = `data/${name}.js`;
        script.onerror = () => entry.fail(new Error(`data/${name}.js is missing: copy the whole folder`));
        document.head.append(script);
      }
      return waiting.get(name).promise;
    },
  };
})();

const $ = (id) => document.getElementById(id);
const NONE = -1;
const OVERSCAN = 8;
const BOTH = 0.1; // a latent is of both kinds where the rarer one has this share of its rate
const AROUND = 28; // tokens shown on each side of an example's token

function element(tag, className, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const plain = (value) => (value === 0 ? "0" : Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(3))));
function percent(share) {
  if (share === 0) return "0 %";
  const value = 100 * share;
  return `${value >= 10 ? value.toFixed(0) : value >= 0.01 ? Number(value.toPrecision(2)) : value.toExponential(0).replace("e-", "e−")} %`;
}
const count = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;

let run; // data/run.js
let table; // columns over all latents, layer by layer
let shown = new Int32Array(0); // places in the table, in the order of the list
let cursor = 0;
const sorting = { by: "frequency", down: true };

function start(data) {
  run = data;
  run.totals = run.kind_names.map((kind) => run.tokens[kind]);
  run.total = run.totals.reduce((a, b) => a + b, 0);
  const n = run.layers.length * run.latents;
  table = { frequency: new Float32Array(n), image: new Float32Array(n), max: new Float32Array(n), label: new Array(n), loaded: new Uint8Array(run.layers.length) };
  $("run-name").textContent = run.run;
  $("run-about").textContent = `${run.layers.length} × ${run.latents.toLocaleString("en")} latents of ${run.model.split("/").pop()}, on ${count(run.total, "token")} of split ${run.split}`;
  document.title = `${run.run}: latents`;
  $("layer").append(new Option("all", ""), ...run.layers.map((layer) => new Option(layer, layer)));
  if (run.notes.length) {
    $("notes").hidden = false;
    $("notes").querySelector("ul").append(...run.notes.map((note) => element("li", "", note)));
  }
  wire();
  route();
  loadLists();
}

// The layer that is looked at first, the others behind it, one after another.
async function loadLists() {
  const first = run.layers.indexOf(Number(location.hash.split("/")[1] || run.layers[0]));
  const order = [...run.layers.keys()].sort((a, b) => (b === first) - (a === first) || a - b);
  for (const place of order) {
    await loadList(place);
    if (!$("list-view").hidden) refresh();
  }
}

async function loadList(place) {
  const list = await clt.load(`list-${run.layers[place]}`);
  if (table.loaded[place]) return list;
  lists.set(place, list);
  for (let latent = 0, at = place * run.latents; latent < run.latents; latent++, at++) {
    const counts = list.kinds.map((kind) => kind[latent]);
    table.frequency[at] = counts.reduce((a, b) => a + b, 0) / run.total;
    table.image[at] = imageShare(counts);
    table.max[at] = list.max[latent];
    table.label[at] = list.label[latent].join("\n").toLowerCase();
  }
  table.loaded[place] = 1;
  return list;
}

const kindIndex = (name) => run.kind_names.indexOf(name);
// How much more often it is active on an image token than on another one: 0 never there, 1 only there.
function imageShare(counts) {
  const image = kindIndex("image");
  const others = run.total - run.totals[image];
  const of = counts.reduce((a, b) => a + b, 0) - counts[image];
  const rates = [counts[image] / Math.max(1, run.totals[image]), of / Math.max(1, others)];
  return rates[0] + rates[1] ? rates[0] / (rates[0] + rates[1]) : NaN;
}

// ---- the list

function wire() {
  $("search").addEventListener("input", () => { cursor = 0; refresh(true); });
  $("layer").addEventListener("change", () => { cursor = 0; refresh(true); });
  for (const radio of document.querySelectorAll('[name="kind"]')) radio.addEventListener("change", () => { cursor = 0; refresh(true); });
  document.querySelector(".tools").addEventListener("submit", (event) => { event.preventDefault(); openAt(cursor); });
  for (const button of document.querySelectorAll("[data-sort]")) {
    button.addEventListener("click", () => {
      const same = sorting.by === button.dataset.sort;
      sorting.down = same ? !sorting.down : !["id", "label"].includes(button.dataset.sort);
      sorting.by = button.dataset.sort;
      cursor = 0;
      refresh(true);
    });
  }
  let asked = false;
  const later = () => {
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => { asked = false; draw(); });
  };
  addEventListener("scroll", later, { passive: true });
  addEventListener("resize", later);
  addEventListener("hashchange", route);
  addEventListener("keydown", keys);
}

function refresh(toTop = false) {
  filter();
  sort();
  for (const button of document.querySelectorAll("[data-sort]")) {
    button.setAttribute("aria-sort", button.dataset.sort !== sorting.by ? "none" : sorting.down ? "descending" : "ascending");
  }
  const loaded = table.loaded.reduce((a, b) => a + b, 0);
  const wait = loaded < run.layers.length ? `, ${loaded} of ${run.layers.length} layers loaded` : "";
  $("count").textContent = `${count(shown.length, "latent")}${wait}`;
  $("rows").style.height = `calc(${shown.length} * var(--row))`;
  if (toTop && scrollY > $("rows").offsetTop) scrollTo(0, $("rows").offsetTop - 60);
  draw();
}

function filter() {
  const words = $("search").value.trim().toLowerCase();
  const place = /^(\d+)\s*[:/]\s*(\d*)$/.exec(words);
  const layer = $("layer").value === "" ? NONE : run.layers.indexOf(Number($("layer").value));
  const kind = document.querySelector('[name="kind"]:checked').value;
  const kinds = { "": () => true, text: (i) => i < BOTH, image: (i) => i > 1 - BOTH, both: (i) => i >= BOTH && i <= 1 - BOTH };
  const found = [];
  for (let at = 0; at < table.max.length; at++) {
    const [of, latent] = [Math.floor(at / run.latents), at % run.latents];
    if (!table.loaded[of] || (layer !== NONE && of !== layer)) continue;
    if (place) {
      if (run.layers[of] !== Number(place[1]) || (place[2] && !String(latent).startsWith(place[2]))) continue;
    } else if (words && !table.label[at].includes(words)) continue;
    if (!kinds[kind](table.image[at])) continue;
    found.push(at);
  }
  shown = Int32Array.from(found);
}

function sort() {
  const sign = sorting.down ? -1 : 1;
  if (sorting.by === "id") {
    if (sorting.down) shown.reverse();
    return;
  }
  const column = table[sorting.by];
  if (sorting.by === "label") {
    // what has no label comes last either way
    shown.sort((a, b) => !column[a] - !column[b] || (column[a] < column[b] ? -sign : column[a] > column[b] ? sign : a - b));
    return;
  }
  const active = table.frequency; // what is never active comes last either way
  shown.sort((a, b) => !active[a] - !active[b] || sign * (column[a] - column[b]) || a - b);
}

function draw() {
  const rows = $("rows");
  if ($("list-view").hidden) return;
  const height = parseFloat(getComputedStyle(rows).getPropertyValue("--row"));
  const above = Math.max(0, scrollY - rows.offsetTop);
  const first = Math.max(0, Math.floor(above / height) - OVERSCAN);
  const last = Math.min(shown.length, Math.ceil((above + innerHeight) / height) + OVERSCAN);
  const made = [];
  for (let place = first; place < last; place++) {
    const row = rowOf(shown[place], place);
    row.style.top = `${place * height}px`;
    made.push(row);
  }
  if (!shown.length) made.push(element("p", "empty", table.loaded.every(Boolean) ? "No latent is like that." : "Loading …"));
  rows.replaceChildren(...made);
}

function rowOf(at, place) {
  const [of, latent] = [Math.floor(at / run.latents), at % run.latents];
  const layer = run.layers[of];
  const row = element("a", place === cursor ? "row at" : "row");
  row.href = `#/${layer}/${latent}`;
  row.setAttribute("role", "row");
  row.tabIndex = -1;
  row.dataset.at = at;
  const cells = [idCell(layer, latent), labelCell(of, latent), kindCell(of, latent), frequencyCell(table.frequency[at]), element("div", "c-max", table.max[at] ? plain(table.max[at]) : "")];
  for (const cell of cells) cell.setAttribute("role", "cell");
  row.append(...cells);
  return row;
}

const idCell = (layer, latent) => element("div", "c-id", element("i", "", `${layer}:`), String(latent));

function labelCell(of, latent) {
  const list = held(of);
  const cell = element("div", "c-label");
  if (!list) return cell;
  if (list.pictures[latent]) cell.append(element("span", "chip patches", "patches"));
  cell.append(...list.label[latent].map((text) => element("span", "chip", text)));
  return cell;
}

const lists = new Map();
const held = (of) => lists.get(of);

function shareBar(counts) {
  const total = counts.reduce((a, b) => a + b, 0);
  const bar = element("div", "share");
  if (!total) return bar;
  bar.append(...counts.map((n, kind) => {
    const part = element("i", `k-${run.kind_names[kind]}`);
    part.style.width = `${(100 * n) / total}%`;
    return part;
  }));
  bar.title = counts.map((n, kind) => `${run.kind_names[kind]} ${percent(n / total)}`).filter((_, kind) => counts[kind]).join(", ");
  return bar;
}

function kindCell(of, latent) {
  const list = held(of);
  return element("div", "c-kind", shareBar(list ? list.kinds.map((kind) => kind[latent]) : []));
}

function frequencyCell(frequency) {
  if (!frequency) return element("div", "c-frequency never", element("span", ""), element("b", "", "never"));
  const meter = element("i", "");
  meter.style.width = `${Math.max(2, 100 * (1 + Math.log10(frequency) / 6))}%`; // from one in a million
  return element("div", "c-frequency", element("div", "meter", meter), element("b", "", percent(frequency)));
}

// ---- keys

function keys(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target.matches("input[type=search], select");
  const inList = !$("list-view").hidden;
  if (event.key === "/" && !typing) {
    event.preventDefault();
    if (!inList) showList();
    $("search").focus();
    $("search").select();
  } else if (event.key === "Escape") {
    if (!inList) location.hash = "#/";
    else if (typing) event.target.blur();
  } else if (inList && (event.key === "ArrowDown" || event.key === "ArrowUp") && !event.target.matches("select, [type=radio]")) {
    event.preventDefault();
    moveTo(cursor + (event.key === "ArrowDown" ? 1 : -1));
  } else if (inList && event.key === "Enter" && !event.target.closest("button, select, input")) {
    openAt(cursor);
  } else if (!inList && (event.key === "ArrowLeft" || event.key === "ArrowRight")) {
    document.querySelector(event.key === "ArrowLeft" ? "[rel=prev]" : "[rel=next]")?.click();
  }
}

function moveTo(place) {
  cursor = Math.max(0, Math.min(shown.length - 1, place));
  const height = parseFloat(getComputedStyle($("rows")).getPropertyValue("--row"));
  const top = $("rows").offsetTop + cursor * height;
  if (top < scrollY + height) scrollTo(0, Math.max(0, top - 2 * height));
  else if (top + height > scrollY + innerHeight) scrollTo(0, top + 2 * height - innerHeight);
  draw();
}

function openAt(place) {
  if (!shown.length) return;
  const at = shown[Math.min(place, shown.length - 1)];
  location.hash = `#/${run.layers[Math.floor(at / run.latents)]}/${at % run.latents}`;
}

// ---- one latent

let listScroll = 0;
function showList() {
  if (location.hash.split("/").length > 2) history.pushState(null, "", "#/");
  $("latent-view").hidden = true;
  $("list-view").hidden = false;
  document.title = `${run.run}: latents`;
  refresh();
  scrollTo(0, listScroll);
}

async function route() {
  const [, layer, latent] = location.hash.split("/");
  const of = run.layers.indexOf(Number(layer));
  const isLatent = layer && latent !== undefined && of !== NONE && Number(latent) < run.latents;
  if (!isLatent) {
    showList();
    return;
  }
  if (!$("list-view").hidden) listScroll = scrollY;
  await showLatent(of, Number(latent));
}

async function showLatent(of, latent) {
  const [layer, hash] = [run.layers[of], location.hash];
  const view = $("latent-view");
  try {
    const [list, block] = await Promise.all([loadList(of), clt.load(`latents-${layer}-${Math.floor(latent / run.latent_block)}`)]);
    const found = block[latent % run.latent_block];
    const needed = [...new Set(found.examples.map(([sample]) => sampleBlock(sample)))];
    const blocks = new Map(await Promise.all(needed.map(async (number) => [number, await clt.load(`samples-${number}`)])));
    if (location.hash !== hash) return; // another one was asked for meanwhile
    view.replaceChildren(barOf(of, latent), element("div", "two", factsOf(of, latent, list, found), examplesOf(found, blocks)));
  } catch (fault) {
    view.replaceChildren(element("p", "empty", fault.message));
  }
  document.title = `${layer}:${latent}, ${run.run}`;
  $("list-view").hidden = true;
  view.hidden = false;
  scrollTo(0, 0);
}

function sampleBlock(sample) {
  let [low, high] = [0, run.sample_blocks.length - 1];
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (run.sample_blocks[middle] <= sample) low = middle;
    else high = middle - 1;
  }
  return low;
}

function barOf(of, latent) {
  const at = of * run.latents + latent;
  const place = shown.indexOf(at);
  if (place !== NONE) cursor = place;
  const link = (text, rel, to) => {
    const made = element("a", "", text);
    made.rel = rel;
    made.setAttribute("aria-label", `${rel === "prev" ? "previous" : rel} latent`);
    if (to === undefined) made.setAttribute("aria-disabled", "true");
    else made.href = `#/${run.layers[Math.floor(to / run.latents)]}/${to % run.latents}`;
    return made;
  };
  const back = element("a", "", "All latents");
  back.href = "#/";
  const next = place === NONE ? (latent + 1 < run.latents ? at + 1 : undefined) : shown[place + 1];
  const previous = place === NONE ? (latent ? at - 1 : undefined) : shown[place - 1];
  const title = element("h1", "", element("i", "", `${run.layers[of]}:`), String(latent));
  const gist = element("span", "gist", table.frequency[at] ? `${percent(table.frequency[at])} of tokens` : "never active");
  return element("div", "bar", title, labelCell(of, latent), gist, element("nav", "", back, link("←", "prev", previous), link("→", "next", next)));
}

function fact(title, ...children) {
  return element("section", "", element("h2", "", title), ...children);
}

function factsOf(of, latent, list, found) {
  const counts = list.kinds.map((kind) => kind[latent]);
  const total = counts.reduce((a, b) => a + b, 0);
  const aside = element("aside", "facts");
  if (!total) {
    aside.append(fact("Frequency", element("p", "big", "never"), element("p", "note", `not active on any of ${count(run.total, "token")}`)));
  } else {
    aside.append(
      fact("Frequency", element("p", "big", percent(total / run.total)), element("p", "note", `${count(total, "token")} of ${run.total.toLocaleString("en")}`)),
      fact("Kinds", shareBar(counts), kindLegend(counts, total)),
      fact("Activations", ...histogramOf(found.histogram)),
    );
  }
  aside.append(fact("Writes to", targetsOf(of, found.targets), element("p", "note", "norm at activation 1, of each target’s own deviation")));
  aside.append(fact("Similar, layer " + run.layers[of], similarOf(of, list, found.similar)));
  if (found.promoted) {
    for (const [title, words] of [["Promotes", found.promoted], ["Suppresses", found.suppressed]]) {
      aside.append(fact(title, element("div", "tokens", ...words.map(([text, change]) => {
        const chip = element("span", "chip", visible(text));
        chip.title = `${plain(change)} at activation 1, before the final norm’s scale`;
        return chip;
      }))));
    }
  }
  return aside;
}

function kindLegend(counts, total) {
  const legend = element("div", "legend");
  counts.forEach((n, kind) => {
    if (!run.totals[kind]) return;
    legend.append(element("i", `k-${run.kind_names[kind]}`), element("span", "", run.kind_names[kind]), element("b", "", percent(n / total)), element("b", "soft", `active on ${percent(n / run.totals[kind])}`));
  });
  return legend;
}

function histogramOf([first, counts]) {
  const most = Math.max(...counts);
  const bars = counts.map((n, place) => {
    const bar = element("i", "");
    bar.style.height = `${n ? Math.max(2, (100 * Math.sqrt(n)) / Math.sqrt(most)) : 0}%`;
    bar.title = `${plain(run.bins[first + place])} to ${plain(run.bins[first + place + 1])}: ${count(n, "token")}`;
    return bar;
  });
  const chart = element("div", "histogram", ...bars);
  chart.setAttribute("role", "img");
  chart.setAttribute("aria-label", `activations from ${plain(run.bins[first])} to ${plain(run.bins[first + counts.length])}`);
  return [chart, element("div", "axis", element("span", "", plain(run.bins[first])), element("span", "", "two bins an octave, root scale"), element("span", "", plain(run.bins[first + counts.length])))];
}

function targetsOf(of, norms) {
  const bars = element("div", "bars");
  const most = Math.max(...norms, 1e-9);
  norms.forEach((norm, offset) => {
    const meter = element("i", "");
    meter.style.width = `${(100 * norm) / most}%`;
    bars.append(element("span", "", `${run.layers[of + offset]}`), element("div", "meter", meter), element("b", "soft", plain(norm)));
  });
  return bars;
}

function similarOf(of, list, similar) {
  const layer = run.layers[of];
  const rows = similar.flatMap(([other, encoder, decoder]) => {
    const link = element("a", "", `${layer}:${other}`);
    link.href = `#/${layer}/${other}`;
    const what = [list.pictures[other] ? "▦" : "", ...list.label[other]].filter(Boolean).join(" ");
    return [link, element("span", "what", what), element("span", "n", encoder.toFixed(2)), element("span", "n", decoder.toFixed(2))];
  });
  return element("div", "alike", element("span", "th", ""), element("span", "th", ""), element("span", "th n", "reads"), element("span", "th n", "writes"), ...rows);
}

function examplesOf(found, blocks) {
  const groups = [
    ["Strongest", found.examples.filter((example) => example[2] < 0)],
    ["From its strongest to its weakest activations, at even quantiles", found.examples.filter((example) => example[2] >= 0)],
  ];
  const most = Math.max(1e-9, ...found.examples.flatMap((example) => example[4]));
  const column = element("div", "examples");
  for (const [title, examples] of groups) {
    if (examples.length) column.append(element("section", "", element("h2", "", title), ...examples.map((example) => card(example, blocks, most))));
  }
  if (!found.examples.length) column.append(element("p", "empty", "It was never active, so there is nothing to show."));
  return column;
}

function card([number, peak, quantile, places, values], blocks, most) {
  const block = blocks.get(sampleBlock(number));
  const sample = block.samples[number];
  const active = new Map(places.map((place, i) => [place, values[i]]));
  const head = element("header", "", element("b", "", plain(active.get(peak) ?? 0)));
  if (quantile >= 0) head.append(element("span", "", `quantile ${Math.round(100 * quantile)} %`));
  head.append(element("span", "", `active on ${count(places.length, "token")} here`), element("span", "id", String(sample.id ?? number)));
  const pictures = (sample.images ?? []).filter((image, i, all) => all.length < 3 || image.tokens.includes(peak) || i === 0);
  const text = textOf(sample, active, peak, most);
  if (!pictures.length) return element("article", "card", head, text);
  const column = element("div", "", ...pictures.map((image) => picturesOf(image, block.grids[image.grid], active, peak, most)));
  return element("article", "card", head, element("div", "with", column, text));
}

// The picture, and beside it in grey with every patch at its place.
function picturesOf(image, grid, active, peak, most) {
  const both = ["picture", "heat"].map((className) => {
    const figure = element("figure", className);
    figure.style.aspectRatio = `${image.w} / ${image.h}`;
    if (image.src) {
      const img = element("img", "");
      img.src = image.src;
      img.alt = className === "heat" ? "" : "the picture of this sample";
      img.loading = "lazy";
      figure.append(img);
    } else if (className === "picture") figure.append(element("figcaption", "", image.why));
    return figure;
  });
  image.tokens.forEach((place, i) => {
    const value = active.get(place);
    if (value === undefined || !grid[i]) return;
    const [left, top, right, bottom] = grid[i];
    const patch = element("i", place === peak ? "peak" : "");
    patch.style.cssText = `left:${left}%;top:${top}%;width:${right - left}%;height:${bottom - top}%;opacity:${shade(value, most)}`;
    patch.title = plain(value);
    both[1].append(patch);
  });
  return element("div", Math.max(image.w, image.h) <= 128 ? "pictures tiny" : "pictures", ...both);
}

const shade = (value, most) => (0.12 + 0.78 * Math.sqrt(value / most)).toFixed(3);
const visible = (text) => text.replace(/\n/g, "↵").replace(/\t/g, "⇥");

// The sample's tokens, a run of picture tokens as one mark; cut around the example's token until asked.
function textOf(sample, active, peak, most) {
  const image = String(run.kind_names.indexOf("image"));
  const gaps = new Set(sample.gaps);
  const parts = [];
  let next = 0;
  for (let place = 0; place < sample.k.length; place++) {
    if (gaps.has(place)) parts.push({ place, node: element("span", "dim", "…") });
    if (sample.k[place] === image) {
      if (place && sample.k[place - 1] === image) continue;
      parts.push({ place, node: element("span", "picture", "picture") });
      continue;
    }
    const text = sample.t[next++];
    const whole = text.replace(/\n/g, "↵\n");
    const value = active.get(place);
    const node = element("span", value === undefined ? (sample.k[place] === "0" ? "" : "dim") : "on", visible(text));
    if (value !== undefined) {
      node.style.setProperty("--a", (0.85 * shade(value, most)).toFixed(3));
      node.title = plain(value);
    }
    if (place === peak) node.classList.add("peak");
    parts.push({ place, node, whole });
  }
  const body = element("p", "text");
  const middle = Math.max(0, parts.findIndex((part) => part.place >= peak));
  const [first, last] = sample.k[peak] === image ? [0, 2 * AROUND] : [middle - AROUND, middle + AROUND + 1];
  const cut = parts.slice(Math.max(0, first), last);
  body.append(first > 0 ? "… " : "", ...cut.map((part) => part.node), last < parts.length ? " …" : "");
  const wrap = element("div", "", body);
  if (cut.length < parts.length) {
    const more = element("button", "more", `Show all ${count(sample.k.length, "token")}`);
    more.addEventListener("click", () => {
      for (const part of parts) if (part.whole) part.node.textContent = part.whole;
      body.replaceChildren(...parts.map((part) => part.node));
      more.remove();
    });
    wrap.append(more);
  }
  if (sample.text) wrap.append(element("p", "source", sample.text));
  return wrap;
}
