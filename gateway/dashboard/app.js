// The page's one loop: ask /admin/state every two seconds, show it, say when it cannot be asked.

import { Chart, rolling } from "./charts.js";
import { $, age, decimal, duration, mark, percent, say, time } from "./dom.js";
import * as views from "./views.js";

const EVERY = 2000, PATIENCE = 8000, STALE_AFTER = 6000; // milliseconds
const TOKEN = "cairn-admin-token", THEME = "cairn-theme";

const series = { life: "", next: 0, columns: {}, step: 5, steps: 180 };
let state = null, heard = 0, chosen = null, opener = null, paused = false, timer = 0, asking = false, polls = 0, usage = [], states = new Map();

class Refused extends Error {}

/** JSON from the gateway.  Throws Refused for a token that is missing or wrong. */
async function ask(path, method = "GET") {
  const token = sessionStorage.getItem(TOKEN);
  const reply = await fetch(path, { method, cache: "no-store", signal: AbortSignal.timeout(PATIENCE),
    headers: token ? { authorization: `Bearer ${token}` } : {} });
  if (reply.status === 401 || reply.status === 403) throw new Refused();
  const body = await reply.json().catch(() => null);
  if (!reply.ok) throw new Error(body?.error?.message ?? `the gateway answered ${reply.status}`);
  return body;
}

// -- the loop --------------------------------------------------------------------------------------

async function poll() {
  clearTimeout(timer);
  if (asking || paused || document.hidden || $("#ask-token").open) return;
  asking = true;
  let news = null;
  try {
    news = await ask(`admin/state?since=${series.next}&life=${series.life}`);
    if (polls++ % 5 === 0) usage = await tenants();
  } catch (error) {
    if (error instanceof Refused) return askToken();
  } finally {
    asking = false;
  }
  timer = setTimeout(poll, EVERY);
  if (news) {
    [state, heard] = [news, Date.now()];
    append(state);
    show();
  }
  freshness();
}

/** Asked for every fifth time: usage is slow news.  A gateway that cannot say has none. */
async function tenants() {
  try {
    return (await ask("admin/tenants")).tenants;
  } catch (error) {
    if (error instanceof Refused) throw error;
    return [];
  }
}

function append({ life, series: news }) {
  if (life !== series.life) Object.assign(series, { life, columns: {} });
  for (const [name, values] of Object.entries(news.columns))
    series.columns[name] = [...(series.columns[name] ?? []), ...values].slice(-news.steps);
  Object.assign(series, { next: news.next, step: news.step_seconds, steps: news.steps });
}

function show() {
  views.tiles(state.headline);
  views.workers(state, order);
  views.requests(state, chosen, choose);
  views.heat(state);
  views.errors(state);
  views.tenants(usage);
  drawCharts();
  announce();
  say($("#base"), base(state.api));
  say($("#about"), `policy ${state.policy}`);
  say($("#foot"), `Figures of gateway process ${state.process}, up ${age(state.headline.uptime_seconds)}. Time to first token is what a client waits, without its network. ` +
    "Tiers are those the index named, as far as the worker confirmed; prefill saved is at the worker's measured speed, less the time to load.");
}

/** Where clients go: beside this page, unless the API has a port of its own. */
function base(api) {
  const url = new URL("v1", window.location.href);
  if (api) url.port = api.port;
  if (api?.host) url.hostname = api.host;
  return url.href;
}

/** Say aloud only what somebody would want to be interrupted for. */
function announce() {
  const now = new Map(state.workers.map((worker) => [worker.id, worker.state]));
  const changed = [...now].filter(([id, is]) => states.has(id) && states.get(id) !== is).map(([id, is]) => `${id} is ${is}`);
  const gone = [...states.keys()].filter((id) => !now.has(id)).map((id) => `${id} has left`);
  states = now;
  if (changed.length || gone.length) say($("#says"), [...changed, ...gone].slice(0, 3).join(", "));
}

function freshness() {
  const silent = Date.now() - heard;
  const lost = heard && silent > STALE_AFTER;
  const kind = paused ? "paused" : lost ? "lost" : heard ? "live" : "waiting";
  mark($("#live"), "data-state", kind);
  say($("#live .text"), { paused: "Paused", lost: "Not answering", live: "Live", waiting: "Connecting" }[kind]);
  const notice = $("#notice");
  if (lost && !paused) {
    if (notice.hidden) say($("#says"), "The gateway does not answer; the figures are old.");
    say(notice, `The gateway does not answer. What you see is from ${time(heard / 1000)}, ${age(silent / 1000)} ago.`);
  } else if (!notice.hidden && heard) say($("#says"), "The gateway answers again.");
  notice.hidden = !lost || paused;
}
setInterval(freshness, 1000);

// -- charts ----------------------------------------------------------------------------------------

const SMOOTH = 6; // steps: half a minute, since a few prompts are no rate
const share = (tier) => (columns) => {
  const all = rolling(columns.prompt_tokens, SMOOTH);
  return rolling(columns[tier], SMOOTH).map((tokens, i) => (all[i] ? tokens / all[i] : null));
};
const plain = (name) => (columns) => columns[name];
const perSecond = (name) => (columns) => rolling(columns[name], 3).map((n, i) => n / (series.step * Math.min(3, i + 1)));
const milliseconds = (seconds) => (seconds == null ? "–" : duration(seconds));

const axisSeconds = (seconds) => (seconds < 0.999 ? `${+(1000 * seconds).toFixed(1)} ms` : `${+seconds.toFixed(1)} s`);

const charts = [
  new Chart($("#chart-hits"), views.TIERS.map((tier) => ({ label: tier, class: tier, values: share(tier) })),
    { stacked: true, top: 1, format: percent, axis: percent }, point),
  new Chart($("#chart-ttft"), [
    { label: "without, p50", class: "miss", values: plain("miss_p50"), band: 1 }, { label: "to p95", class: "miss band", values: plain("miss_p95") },
    { label: "with hits, p50", class: "hit", values: plain("hit_p50"), band: 3 }, { label: "to p95", class: "hit band", values: plain("hit_p95") },
  ], { log: true, format: milliseconds, axis: axisSeconds }, point),
  new Chart($("#chart-rate"), [
    { label: "requests", class: "ok", wash: true, values: perSecond("requests") }, { label: "errors", class: "fail", values: (columns) => perSecond("errors")(columns).map((n) => n || null) },
  ], { least: 1, format: (n) => decimal(n ?? 0), axis: (value) => String(+value.toFixed(2)) }, point),
];

function drawCharts() {
  const length = series.columns.requests?.length ?? 0;
  const times = Array.from({ length }, (_, i) => heard / 1000 - (length - 1 - i) * series.step);
  for (const chart of charts) chart.show(series.columns, times, series.steps);
}

function point(index) {
  for (const chart of charts) chart.point(index);
  say($("#cursor"), index == null ? "" : time(charts[0].times[index]));
}

// -- what one can do -------------------------------------------------------------------------------

async function choose(turn, button) {
  if (chosen === turn) return close();
  chosen = turn;
  opener = button;
  views.requests(state, chosen, choose);
  try {
    const found = await ask(`admin/decisions/${turn}`);
    if (chosen !== turn) return;
    views.receipt(found);
    mark($("#receipt"), "data-open", "");
    $("#receipt-close").hidden = false;
    $("#h-receipt").focus({ preventScroll: true });
  } catch (error) {
    if (error instanceof Refused) return askToken();
    say($("#receipt-body"), error.message);
  }
}

function close() {
  chosen = null;
  mark($("#receipt"), "data-open", null);
  $("#receipt-close").hidden = true;
  views.noReceipt();
  if (state) views.requests(state, chosen, choose);
  (opener?.isConnected ? opener : $("#flow-card")).focus({ preventScroll: true });
}

async function order(worker, what) {
  const drain = what === "drain";
  say($("#h-confirm"), `${drain ? "Drain" : "Resume"} ${worker.id}?`);
  say($("#confirm-text"), drain ? `It gets no new requests until somebody resumes it, also after a restart. ${worker.inflight} under way here will finish.` : "It takes new requests again.");
  say($("#confirm-yes"), drain ? "Drain" : "Resume");
  const dialog = $("#confirm");
  dialog.returnValue = "no";
  dialog.showModal();
  await new Promise((closed) => dialog.addEventListener("close", closed, { once: true }));
  if (dialog.returnValue !== "yes") return;
  try {
    await ask(`admin/workers/${worker.id.split("/").map(encodeURIComponent).join("/")}/${what}`, "POST");
    say($("#says"), `${worker.id}: ${what}`);
  } catch (error) {
    if (error instanceof Refused) return askToken();
    window.alert(error.message);
  }
  poll();
}

function askToken() {
  const dialog = $("#ask-token");
  say($("#token-wrong"), sessionStorage.getItem(TOKEN) ? "This token was not accepted." : "");
  sessionStorage.removeItem(TOKEN);
  $("#forget").hidden = true;
  if (!dialog.open) dialog.showModal();
}

$("#ask-token").addEventListener("close", () => {
  const token = $("#token").value.trim();
  $("#token").value = "";
  if (token) sessionStorage.setItem(TOKEN, token);
  $("#forget").hidden = !token;
  poll();
});
$("#forget").addEventListener("click", () => {
  sessionStorage.removeItem(TOKEN);
  window.location.reload();
});
$("#forget").hidden = !sessionStorage.getItem(TOKEN);
$("#pause").addEventListener("click", () => {
  paused = !paused;
  mark($("#pause"), "aria-pressed", paused);
  freshness();
  if (!paused) poll();
});
$("#receipt-close").addEventListener("click", close);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && chosen != null && !document.querySelector("dialog[open]")) close();
});
document.addEventListener("visibilitychange", poll);

// -- theme -----------------------------------------------------------------------------------------

const themes = ["auto", "light", "dark"];
function theme(name) {
  document.documentElement.dataset.theme = name;
  say($("#theme"), `Theme: ${name}`);
  localStorage.setItem(THEME, name);
}
theme(themes.includes(localStorage.getItem(THEME)) ? localStorage.getItem(THEME) : "auto");
$("#theme").addEventListener("click", () =>
  theme(themes[(themes.indexOf(document.documentElement.dataset.theme) + 1) % themes.length]));

poll();
