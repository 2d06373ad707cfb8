// The tiles and tables.

import { $, age, compact, count, decimal, duration, h, keyed, mark, NONE, percent, say, span, time } from "./dom.js";

export const TIERS = ["device", "host", "disk", "shared"];
const TERMS = ["queue", "transfer", "compute", "interference"];
const MOST_RECEIPT_ROWS = 12;

// -- tiles -----------------------------------------------------------------------------------------

function tile(name, text, unit = "") {
  const node = $(`[data-tile="${name}"]`);
  if (node.shown === text + unit) return;
  node.shown = text + unit;
  node.replaceChildren(text, ...(unit ? [h("span", { class: "unit" }, unit)] : []));
}

export function tiles(now) {
  tile("rate", decimal(now.requests_per_second), "/s");
  tile("rate-more", `${compact(now.requests)} in ${age(now.uptime_seconds)}`);
  for (const kind of ["hit", "miss"]) {
    const [p50, p95] = now[`ttft_${kind}`] ?? [null, null];
    tile(`${kind}50`, ...span(p50));
    tile(`${kind}95`, `p95 ${duration(p95)}`);
  }
  tile("hits", now.hit_rate == null ? NONE : count(100 * now.hit_rate), now.hit_rate == null ? "" : "%");
  const told = now.confirmed == null || now.confirmed > 0.95 ? "" : `, ${percent(now.confirmed)} told`;
  tile("hits-more", `15 min: ${percent(now.hit_rate_long)}${told}`);
  const saved = (seconds) => span(Math.max(0, seconds));
  tile("saved", ...saved(now.saved_seconds));
  tile("saved-more", `15 min: ${saved(now.saved_seconds_long).join(" ")}`);
  tile("errors", decimal(now.errors_per_minute), "/min");
  tile("errors-more", `refused (4xx): ${decimal(now.refused_per_minute)}/min`);
  mark($('[data-tile="errors"]'), "class", now.errors_per_minute > 0 ? "alarm" : null);
  tile("inflight", count(now.inflight));
  tile("inflight-more", now.queued == null ? "requests being answered" : `${count(now.queued)} queued`);
}

// -- workers ---------------------------------------------------------------------------------------

function stateOf(worker) {
  if (worker.state !== "ready") return [worker.state, worker.state];
  if (worker.health !== "closed")
    return ["breaker", { open: "breaker open", half_open: "breaker half open", wedged: "wedged" }[worker.health] ?? worker.health];
  if (worker.stale) return ["stale", "stale: no lease"];
  if (worker.share < 1) return ["warming", `warming ${percent(worker.share)}`];
  return ["ready", "ready"];
}

function workerRow(worker, order) {
  const pill = h("p", { class: "pill" }, h("span", { class: "mark", "aria-hidden": "true" }), h("span", { class: "text" }));
  const button = h("button", { type: "button" });
  const row = h("tr", { role: "row" },
    h("th", { scope: "row", role: "rowheader", class: "name" }, h("span"), h("small")),
    h("td", { role: "cell", class: "state" }, pill),
    h("td", { role: "cell", class: "n", "data-label": "Running" }), h("td", { role: "cell", class: "n", "data-label": "Waiting" }),
    h("td", { role: "cell", class: "tiers-col" }, h("div", { class: "fills" })),
    h("td", { role: "cell", class: "trust", "data-label": "Hit precision" }, h("span"), h("small")),
    h("td", { role: "cell", class: "orders" }, button));
  button.addEventListener("click", () => order(row.worker, button.order));
  return row;
}

function fill(tier) {
  return h("div", { class: `fill ${tier.name}` }, h("p", { class: "label" }, h("span", {}, tier.name), h("span")),
    h("span", { class: "track", "aria-hidden": "true" }, h("i")));
}

function updateWorker(row, worker) {
  row.worker = worker;
  const [name, state, running, waiting, tiers, trust, orders] = row.children;
  say(name.firstChild, worker.id);
  const adapters = worker.adapters.length + worker.adapters_left_out;
  say(name.lastChild, worker.model + (adapters ? ` + ${worker.adapters.slice(0, 3).join(", ")}${adapters > 3 ? ` and ${adapters - 3} more` : ""}` : ""));
  const [kind, text] = stateOf(worker);
  mark(state.firstChild, "data-state", kind);
  say(state.querySelector(".text"), text);
  say(running, worker.running == null ? count(worker.inflight) : count(worker.running));
  say(waiting, count(worker.waiting));
  const fills = tiers.firstChild;
  keyed(fills, worker.tiers, (tier) => tier.name, (tier) => fill(tier), (node, tier) => {
    say(node.querySelector(".label").lastChild, tier.slots ? `${compact(tier.used)} of ${compact(tier.slots)}` : tier.up ? "on" : "out of reach");
    node.querySelector(".track").hidden = !tier.slots;
    node.querySelector("i").style.width = tier.slots ? `${Math.min(100, (100 * tier.used) / tier.slots)}%` : "0";
  });
  const local = worker.trust.local ?? {};
  say(trust.firstChild, local.precision == null ? NONE : percent(local.precision));
  say(trust.lastChild, !worker.trusted ? (worker.leased ? "other keys" : "no cache known") : { STALE: "not believed", EXACT: "believed" }[local.state] ?? "not heard lately");
  const button = orders.firstChild;
  button.order = worker.state === "drained" || worker.state === "draining" ? "resume" : "drain";
  say(button, button.order === "drain" ? "Drain" : "Resume");
  mark(button, "aria-label", `${button.textContent} ${worker.id}`);
}

export function workers(state, order) {
  keyed($("#workers tbody"), state.workers, (worker) => worker.id, (worker) => workerRow(worker, order), updateWorker);
  const none = !state.workers.length;
  $("#workers").hidden = none;
  $("#workers ~ .empty").hidden = !none;
  const ready = state.workers.filter((worker) => worker.state === "ready").length;
  const notes = none ? [] : [`${ready} of ${state.workers.length} ready`];
  if (state.workers_left_out) notes.push(`${state.workers_left_out} more not shown`);
  if (state.removed.length) notes.push(`removed: ${state.removed.slice(0, 5).join(", ")}`);
  say($("#workers-note"), notes.join(" · "));
  document.title = none ? "Cairn" : `Cairn · ${ready} of ${state.workers.length} ready`;
}

// -- requests --------------------------------------------------------------------------------------

function requestRow(decision, choose) {
  const pick = h("button", { type: "button", class: "pick" }, time(decision.at));
  const row = h("tr", {}, h("th", { scope: "row" }, pick), h("td", { class: "opt cut", title: decision.model }, decision.model),
    h("td", { class: "n" }, count(decision.prompt_tokens)), h("td", { class: "n" }, count(decision.expected_hit_tokens)),
    h("td", { class: "n" }), h("td", { class: "cut" }), h("td", { class: "opt" }, h("span", { class: "tag" }, decision.reason.replaceAll("_", " "))),
    h("td", { class: "n" }));
  row.addEventListener("click", () => choose(decision.turn, pick));
  return row;
}

export function requests(state, chosen, choose) {
  keyed($("#flow tbody"), state.decisions, (decision) => decision.turn, (decision) => requestRow(decision, choose), (row, decision) => {
    const cells = row.children;
    const actual = decision.actual_hit_tokens;
    const less = actual != null && actual < decision.expected_hit_tokens;
    say(cells[4], actual == null ? NONE : (less ? "↓ " : "") + count(actual));
    mark(cells[4], "class", less ? "n less" : "n");
    mark(cells[4], "title", less ? "less than expected" : null);
    say(cells[5], decision.answered_by ?? decision.worker);
    say(cells[7], decision.ttft_ms == null ? NONE : duration(decision.ttft_ms / 1000));
    mark(row, "data-chosen", decision.turn === chosen ? "" : null);
    mark(cells[0].firstChild, "aria-pressed", decision.turn === chosen);
  });
  const none = !state.decisions.length;
  $("#flow").hidden = none;
  $("#flow ~ .empty").hidden = !none;
}

const nothingChosen = [...$("#receipt-body").childNodes];
export const noReceipt = () => $("#receipt-body").replaceChildren(...nothingChosen);

export function receipt(found) {
  const most = Math.max(...found.workers.map((worker) => worker.total_ms), 0.001);
  const facts = {
    Request: `${time(found.at)} · ${found.model} · ${count(found.prompt_tokens)} tokens`,
    "Sent to": found.worker + (found.answered_by && found.answered_by !== found.worker ? `, answered by ${found.answered_by}` : ""),
    Because: because(found),
    "First token": found.ttft_ms == null ? "not yet" : `${duration(found.ttft_ms / 1000)}, predicted ${duration(found.predicted_ms / 1000)}`,
    Cached: `${found.actual_hit_tokens == null ? "not told" : count(found.actual_hit_tokens)} tokens, expected ${count(found.expected_hit_tokens)}`,
    "Look-up": found.index === "unused" ? "not asked" : `${decimal(found.lookup_ms)} ms`,
  };
  const rows = found.workers.slice(0, MOST_RECEIPT_ROWS).flatMap((worker) => receiptRows(worker, found, most));
  const more = found.workers.length - MOST_RECEIPT_ROWS;
  $("#receipt-body").replaceChildren(
    h("dl", {}, ...Object.entries(facts).flatMap(([name, text]) => [h("dt", {}, name), h("dd", {}, text)])),
    h("h4", {}, "What each worker would have cost, ms"),
    h("ul", { class: "legend" }, ...TERMS.map((term) => h("li", {}, h("i", { class: `swatch ${term}`, "aria-hidden": "true" }), term))),
    h("table", {}, h("caption", { class: "hidden" }, "Predicted milliseconds to the first token by worker"),
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Worker"), ...["queue", "transf.", "comp.", "interf.", "total"].map((name) => h("th", { scope: "col", class: "n" }, name)))),
      h("tbody", {}, ...rows)),
    ...(more > 0 ? [h("p", { class: "quiet" }, `and ${more} more, dearer`)] : []));
}

function because(found) {
  const blind = { policy: "the policy does not look at the cache", index_down: "the index did not answer", no_index: "there is no index",
    no_scheme: "no worker names chunks as we do", no_keys: "the prompt has no chunk keys", stale: "the index is not believed" }[found.blind];
  if (blind) return blind;
  const reason = { hit: "it holds part of the prompt", cold: "nobody worth going to holds any of it" }[found.reason] ?? found.reason.replaceAll("_", " ");
  const [chosen] = found.workers;
  const cheapest = found.workers.every((worker) => worker.total_ms >= chosen.total_ms);
  return `${reason}, and it was ${cheapest ? "cheapest" : "nearly cheapest: open requests, and who waits behind, count too"}`;
}

function receiptRows(worker, found, most) {
  const chosen = worker.worker === found.worker;
  const held = TIERS.filter((tier) => worker.hit_by_tier[tier]).map((tier) => `${count(worker.hit_by_tier[tier])} ${tier}`);
  const notes = [held.length ? `holds ${held.join(", ")}` : "holds nothing of it", ...(worker.inflight ? [`${worker.inflight} open`] : []), ...(worker.held_back ? ["held back: new"] : [])];
  const bar = h("div", { class: "bars", "aria-hidden": "true" });
  for (const term of TERMS) {
    const share = (100 * (worker.terms_ms[term] ?? 0)) / most;
    if (share < 0.2) continue;
    const piece = h("i", { class: term });
    piece.style.width = `${share}%`;
    bar.append(piece);
  }
  return [
    h("tr", {}, h("th", { scope: "row", class: "name" }, chosen ? h("b", {}, `${worker.worker} ✓`) : worker.worker, chosen ? h("span", { class: "hidden" }, " chosen") : null),
      ...TERMS.map((term) => h("td", { class: "n" }, decimal(worker.terms_ms[term] ?? 0))), h("td", { class: "n" }, h("b", {}, decimal(worker.total_ms)))),
    h("tr", {}, h("td", { class: "bar", colspan: "6" }, bar, h("small", {}, notes.join(" · ")))),
  ];
}

// -- heat, tenants, errors -------------------------------------------------------------------------

const LOCAL = TIERS.slice(0, 3);
const MOST_HOLDERS = 3;

/** One worker: its bar is as long as the part of the prefix it holds itself. */
function holder(worker, tokens, of) {
  const bar = h("span", { class: "bars", "aria-hidden": "true" });
  const tiers = LOCAL.filter((tier) => tokens[tier]);
  for (const tier of tiers) {
    const piece = h("i", { class: tier });
    piece.style.width = `${(100 * tokens[tier]) / of}%`;
    bar.append(piece);
  }
  const text = tiers.map((tier) => (tokens[tier] > 0.9 * of ? tier : `${tier} ${count(tokens[tier])}`)).join(", ");
  return h("span", { class: "holder" }, h("b", {}, worker), bar, h("span", { class: "quiet" }, text));
}

/** Who holds some of it itself, most first; and what everybody else loads from the shared tier. */
function holders(prefix) {
  const own = ({ tokens }) => LOCAL.reduce((total, tier) => total + tokens[tier], 0);
  const some = prefix.holders.filter(own).sort((a, b) => own(b) - own(a));
  const nodes = some.slice(0, MOST_HOLDERS).map(({ worker, tokens }) => holder(worker, tokens, prefix.tokens));
  const more = some.length - MOST_HOLDERS + prefix.holders_left_out;
  if (more > 0) nodes.push(h("span", { class: "quiet" }, `+${more}`));
  const shared = Math.max(0, ...prefix.holders.map(({ tokens }) => tokens.shared));
  if (shared) nodes.push(h("span", { class: "holder shared quiet" }, h("i", { class: "swatch shared", "aria-hidden": "true" }), `shared ${count(shared)}`));
  return nodes.length ? nodes : [h("span", { class: "quiet" }, "nobody")];
}

export function heat({ heat }) {
  const most = Math.max(1, heat.decisions);
  keyed($("#heat tbody"), heat.prefixes, (prefix) => prefix.key,
    (prefix) => h("tr", { role: "row" },
      h("th", { scope: "row", role: "rowheader" }, h("code", { title: prefix.key }, prefix.key.slice(0, 10))),
      h("td", { role: "cell", class: "opt" }, h("span", { class: "tag" })),
      h("td", { role: "cell", class: "opt cut", title: prefix.model }, prefix.model),
      h("td", { role: "cell", class: "n", "data-label": "Tokens" }),
      h("td", { role: "cell", class: "whole" }, h("div", { class: "share" }, h("span", { class: "track", "aria-hidden": "true" }, h("i")), h("span", { class: "n" }))),
      h("td", { role: "cell", class: "whole" }, h("div", { class: "holders" }))),
    (row, prefix) => {
      const cells = row.children;
      say(cells[1].firstChild, prefix.common ? "common start" : "prompts");
      say(cells[3], count(prefix.tokens));
      const share = prefix.requests / most;
      cells[4].querySelector("i").style.width = `${100 * share}%`;
      say(cells[4].querySelector(".n"), percent(share));
      const key = JSON.stringify(prefix.holders);
      if (row.held === key) return;
      row.held = key;
      cells[5].firstChild.replaceChildren(...holders(prefix));
    });
  const none = !heat.prefixes.length;
  $("#heat").hidden = none;
  $("#heat ~ .empty").hidden = !none;
  say($("#heat-note"), none ? "" : `Of the last ${count(heat.decisions)} requests.`);
}

export function errors(state) {
  keyed($("#errors tbody"), state.errors, (error) => error.kind,
    (error) => h("tr", {}, h("th", { scope: "row", class: "name" }, error.kind.replaceAll("_", " ")), h("td", { class: "n" }), h("td", { class: "n" })),
    (row, error) => {
      say(row.children[1], count(error.count));
      say(row.children[2], time(error.last_at));
    });
  const none = !state.errors.length;
  $("#errors").hidden = none;
  $("#errors ~ .empty").hidden = !none;
}

const of = (used, limit) => (limit ? `${compact(used)} of ${compact(limit)}` : compact(used));

/** What the limited keys of a tenant have used in this minute, of what they may. */
function minute(row, limit, left) {
  const keys = row.keys.filter((key) => key[limit]);
  if (!keys.length) return "no limit";
  const sum = (value) => keys.reduce((total, key) => total + value(key), 0);
  return of(sum((key) => Math.max(0, key[limit] - (key[left] ?? key[limit]))), sum((key) => key[limit]));
}

export function tenants(rows) {
  $("#tenants-section").hidden = !rows.length;
  keyed($("#tenants tbody"), rows, (row) => row.tenant,
    (row) => h("tr", {}, h("th", { scope: "row", class: "name" }, row.tenant), ...Array.from({ length: 7 }, () => h("td", { class: "n" }))),
    (node, row) => {
      const refused = Object.values(row.refused).reduce((total, n) => total + n, 0);
      const month = Math.max(0, ...row.keys.map((key) => key.tokens_per_month));
      const cells = [compact(row.requests), compact(row.prompt_tokens + row.completion_tokens), compact(refused), count(row.inflight),
        minute(row, "rpm", "requests_left"), minute(row, "tpm", "tokens_left"), of(row.month_tokens, month)];
      cells.forEach((text, i) => say(node.children[i + 1], text));
    });
}
