import { $, ago, el, fill, money, none, number, seconds, short, svg, text, things, time, usd, when, whole } from "./elements.js";
import * as savings from "./savings.js";

const GAP_MS = 1000; // the page asks no more often, however busy the proxy is
const READ_MS = 8000; // so long at least a message can be read
const ROWS = 50;
const FIRST_SESSIONS = 8;

const view = {
  session: null, // the one whose exchanges are shown; null: all
  sessions: FIRST_SESSIONS,
  rows: ROWS,
  seen: null, // ids of the exchanges shown before, to mark new ones
  timer: 0,
  next: 0,
  asking: false,
  changes: 0, // by the user, so far
  told: 0, // the timer that hides what was told
  toldAt: 0,
  again: false,
  retry: 1000,
  events: null,
};

// --- what the page shows

function showGauge(session) {
  const gauge = session.gauge;
  const known = gauge.percentage !== null;
  const meter = $("gauge");
  const share = known ? Math.min(gauge.percentage, 100) : 0;
  if (known) meter.dataset.color = gauge.color;
  else delete meter.dataset.color;
  meter.toggleAttribute("data-zero", share === 0);
  meter.setAttribute("aria-valuenow", String(share));
  meter.querySelector(".fill").style.strokeDasharray = `${share} 100`;
  $("gauge-value").textContent = known
    ? `${gauge.percentage < 10 ? gauge.percentage.toFixed(1) : Math.round(gauge.percentage)} %`
    : gauge.tokens === null ? "–" : short(gauge.tokens);
  $("gauge-tokens").textContent = known
    ? `${short(gauge.tokens)} of ${short(gauge.window)} tokens`
    : gauge.tokens === null ? "no tokens counted yet" : "tokens, window not known";
  $("gauge-tokens").title = known ? `${whole.format(gauge.tokens)} of ${whole.format(gauge.window)}` : "";
  meter.setAttribute("aria-valuetext", `${$("gauge-value").textContent}, ${$("gauge-tokens").textContent}`);
  $("context-title").textContent = view.session === null ? "Context of the active session" : "Context of the chosen session";
  const parts = [session.model, session.provider].filter(Boolean).map((part) => el("bdi", {}, part));
  $("context-of").replaceChildren(el("b", {}, title(session)), ...(parts[1] ? [parts[0], " · ", parts[1]] : parts));
}

function title(session) {
  return session.name || session.project || session.id;
}

function showToday(sums) {
  const item = (name, value, note = "", exact = null) =>
    el("div", {}, el("dt", {}, name), el("dd", { title: exact }, value, el("small", {}, note)));
  const tokens = (value) => (value === null ? "–" : short(value));
  const exact = (value) => (value === null ? null : whole.format(value));
  const notes = [
    sums.errors ? `${whole.format(sums.errors)} failed` : "",
    sums.partial ? `${whole.format(sums.partial)} cut off` : "",
    sums.mended ? `${whole.format(sums.mended)} mended` : "",
  ].filter(Boolean).join(", ");
  const cached = sums.cache_read_tokens && sums.input_tokens
    ? `${Math.round((100 * sums.cache_read_tokens) / sums.input_tokens)} % of input` : "";
  const items = [
    item("Requests", whole.format(sums.requests), notes),
    item("Input tokens", tokens(sums.input_tokens), "", exact(sums.input_tokens)),
    item("Output tokens", tokens(sums.output_tokens),
      sums.reasoning_tokens ? `${short(sums.reasoning_tokens)} reasoning` : "", exact(sums.output_tokens)),
    item("Read from cache", tokens(sums.cache_read_tokens), cached, exact(sums.cache_read_tokens)),
    item("Cost", sums.cost_usd === null ? "–" : usd(sums.cost_usd),
      sums.unpriced ? `${whole.format(sums.unpriced)} without a known price` : ""),
  ];
  if (sums.saved_tokens) {
    items.push(item("Saved tokens", short(sums.saved_tokens),
      sums.saved_usd ? `${usd(sums.saved_usd)}` : "", exact(sums.saved_tokens)));
  }
  $("today").replaceChildren(...items);
}

function share(count, requests) {
  const percent = (100 * count) / requests;
  const said = !count ? "" : percent < 1 ? "<1 %" : `${Math.round(percent)} %`;
  return el("td", { class: count ? "n" : "n soft", title: `${whole.format(count)} of ${whole.format(requests)}` },
    `${whole.format(count)} `, el("small", { class: "share" }, said));
}

function providerRow([name, sums]) {
  return el("tr", {},
    name === "" ? el("td", {}, none("refused before a provider was picked")) : text(name),
    number(sums.requests),
    share(sums.errors, sums.requests),
    share(sums.mended, sums.requests),
    number(sums.input_tokens, "not known"),
    number(sums.cache_read_tokens, "the provider did not say"),
    number(sums.output_tokens, "not known"),
    money(sums.cost_usd, "no price known"));
}

function sessionRow(session) {
  const { gauge } = session;
  const chosen = session.id === view.session;
  const button = el("button", { type: "button", "aria-pressed": String(chosen), title: `${title(session)}: show its exchanges` }, title(session));
  button.dataset.id = session.id;
  let level = none("the model's window is not known");
  if (gauge.percentage !== null) {
    level = el("span", { class: "level", "data-color": gauge.color, title: `${whole.format(gauge.tokens)} of ${whole.format(gauge.window)} tokens` },
      svg("svg", { viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" },
        svg("rect", { width: Math.min(gauge.percentage, 100), height: 10 })),
      `${Math.round(gauge.percentage)} %`);
  } else if (gauge.tokens !== null) {
    level = el("span", { title: "tokens; the model's window is not known" }, short(gauge.tokens));
  }
  return el("tr", { "aria-current": chosen ? "true" : null },
    el("td", {}, button),
    el("td", {}, level),
    text(session.client, "wide soft"),
    text(session.model),
    number(session.exchanges),
    number(session.input_tokens),
    number(session.output_tokens),
    money(session.cost_usd, "no price known"),
    el("td", { class: "n soft" }, time(session.last_seen_at, ago(session.last_seen_at))));
}

const SOURCES = {
  usage: ["usage", "said by the provider"],
  tokenizer: ["tokenizer", "counted with the model's own tokenizer"],
  estimate: ["estimate", "estimated with another tokenizer"],
  calibrated: ["estimate", "estimated, calibrated on what this provider reported before"],
};

function tokens(value, source) {
  if (value === null) return number(null, "not known");
  const [kind, explained] = SOURCES[source] ?? ["", "of unknown origin"];
  return el("td", { class: "n" },
    el("span", { class: `tokens ${kind}`, title: `${whole.format(value)} tokens, ${explained}` }, whole.format(value)));
}

function duration(value) {
  return el("td", { class: "n soft" }, value === null ? none("not measured") : seconds(value));
}

// Where the request no longer began as the one before it, by whom.
const BREAKS = {
  client: ["client", "the client changed or dropped what it had sent before"],
  tools: ["client", "the client changed its tools"],
  system: ["client", "the client changed its system text"],
  compression: ["ours", "a summary took the place of older messages"],
  revocation: ["ours", "a summary was revoked"],
  flush: ["ours", "what is masked was decided anew"],
  bypass: ["ours", "the proxy stopped to edit this session’s requests"],
  proxy: ["ours", "we sent what had been sent before in another form"],
  model: ["ours", "another model or provider was picked"],
  provider: ["provider", "the provider no longer had it"],
};

function cacheBreak(row) {
  const [who, why] = BREAKS[row.cache_break_by] ?? [row.cache_break_by ?? "unknown", "for a reason that is not known"];
  const where = row.cache_break ? `at message ${whole.format(row.cache_break)}` : row.cache_break === 0 ? "before the first message" : "";
  return el("span", { class: `badge ${who === "ours" ? "cut" : "soft"}`, title: `The cached beginning ended ${where || "early"}: ${why}` },
    `cache broke ${where}, `.replace(" ,", ","), who);
}

function saved(row) {
  if (row.saved_tokens === null || row.saved_tokens === undefined) return number(null, "not known");
  const parts = [["masked", row.masked_tokens], ["compressed", row.compressed_tokens]]
    .filter(([, count]) => count).map(([how, count]) => `${whole.format(count)} ${how}`);
  const net = row.saved_usd ? [`${usd(row.saved_usd)} net`] : [];
  return el("td", { class: row.saved_tokens ? "n" : "n soft", title: [...parts, ...net].join(", ") || null }, whole.format(row.saved_tokens));
}

function exchangeRow(row) {
  const asked = row["gen_ai.request.model"];
  const answered = row["gen_ai.response.model"];
  const model = el("td", {
    class: "model",
    title: asked && answered && asked !== answered ? `asked for ${asked}, answered by ${answered}` : asked ?? answered,
  }, el("bdi", {}, asked ?? answered ?? none("not known")));
  const failed = row.error_type !== null || (row.status ?? 0) >= 400;
  const status = el("td", {},
    el("span", { class: failed ? "bad" : "soft", title: row.error_type ?? row["gen_ai.response.finish_reason"] },
      row.status === null ? row.error_type ?? "–" : String(row.status)));
  if (row.partial) {
    status.append(el("span", { class: "badge cut", title: "The stream was cut; what came of it was counted" }, "cut off"));
  }
  if (row.mended) {
    status.append(el("span", { class: "badge mended", title: `${things(row.mended, "thing")} mended` }, "mended"));
  }
  if (row.attempts > 1) {
    status.append(el("span", { class: "badge again", title: `${whole.format(row.attempts)} requests to providers were made for it` },
      things(row.attempts - 1, "retry", "retries")));
  }
  if (typeof row.cache_break === "number" || row.cache_break_by) status.append(cacheBreak(row));
  if (row.kind === "background" || row.kind === "subagent") {
    model.append(el("span", { class: "badge soft", title: "Not a turn of the conversation itself" }, row.kind));
  }
  const fresh = view.seen !== null && !view.seen.has(row.id);
  return el("tr", { class: fresh ? "fresh" : null },
    el("td", { class: "soft" }, time(row.started_at, when(row.started_at))),
    model,
    text(row["gen_ai.provider.name"], "soft"),
    tokens(row["gen_ai.usage.input_tokens"], row.input_source),
    number(row["gen_ai.usage.cache_read.input_tokens"], "the provider did not say"),
    saved(row),
    tokens(row["gen_ai.usage.output_tokens"], row.output_source),
    number(row["gen_ai.usage.reasoning.output_tokens"], "the provider did not say"),
    money(row.cost_usd, "no price known"),
    duration(row.time_to_first_chunk_s),
    duration(row.duration_s),
    status);
}

function show(sessions, session, exchanges, totals) {
  const empty = sessions.sessions.length === 0 && exchanges.exchanges.length === 0;
  $("empty").hidden = !empty;
  $("filled").hidden = empty;
  if (empty) {
    view.seen = new Set();
    return;
  }
  $("context").hidden = session === null;
  if (session !== null) showGauge(session);
  showToday(totals.today);
  const providers = Object.entries(totals.today.by_provider)
    .sort(([one, a], [other, b]) => (one === "") - (other === "") || b.requests - a.requests);
  $("providers-section").hidden = providers.length === 0;
  fill($("providers"), providers.map(providerRow));
  fill($("sessions"), sessions.sessions.map(sessionRow));
  $("sessions-more").hidden = sessions.next === null;
  fill($("exchanges"), exchanges.exchanges.map(exchangeRow));
  if (view.seen !== null && exchanges.exchanges.some((row) => !view.seen.has(row.id))) outdated();
  view.seen = new Set(exchanges.exchanges.map((row) => row.id));
  $("older").hidden = exchanges.next === null || view.rows >= 1000;
  $("all").hidden = view.session === null;
  $("exchanges-title").replaceChildren(
    ...(view.session === null ? ["Last exchanges"] : ["Exchanges of ", el("bdi", {}, title(session))]));
  const query = view.session === null ? "" : `?session=${encodeURIComponent(view.session)}`;
  $("csv").href = `api/export/csv${query}`;
  $("json").href = `api/export/json${query}`;
}

function showProxy(status) {
  $("version").textContent = status.version === "unknown" ? "" : status.version;
  const place = status.listening.find((address) => address.port) ?? { host: "127.0.0.1", port: 8080 };
  const anywhere = ["", "0.0.0.0", "::"].includes(place.host);
  const host = anywhere ? location.hostname : place.host.includes(":") ? `[${place.host}]` : place.host;
  const base = `http://${host}:${place.port}`;
  $("how-base").textContent = `export OPENAI_BASE_URL=${base}/v1\nexport ANTHROPIC_BASE_URL=${base}`;
  $("how-proxy").textContent = `export HTTPS_PROXY=${base}\nexport SSL_CERT_FILE=${status.confdir}/mitmproxy-ca-cert.pem`;
  $("how-curl").textContent =
    `curl ${base}/v1/chat/completions -H 'content-type: application/json' \\\n` +
    `  -d '{"model": "MODEL", "messages": [{"role": "user", "content": "Hello"}]}'`;
  $("confdir").textContent = status.confdir;
  const state = status.store.state;
  notice(state === "ok" ? "" : `The store is ${state}. Traffic flows; its numbers wait in memory.`);
}

// What came of something that the user did; the next answer of the proxy does not hide it, later
// traffic does.
function told(message) {
  clearTimeout(view.told);
  view.told = 0;
  view.toldAt = Date.now();
  $("told").hidden = message === "";
  $("told").textContent = message;
}

function outdated() {
  if ($("told").hidden || view.told) return;
  view.told = setTimeout(told, Math.max(0, view.toldAt + READ_MS - Date.now()), "");
}

function notice(message) {
  $("notice").hidden = message === "";
  if ($("notice").textContent !== message) $("notice").textContent = message;
}

// --- asking the API

class Refused extends Error {}

// How full a window is stands on the page, and how to ask the API otherwise is not for people.
function sentence({ error, hint, current_percentage: full }) {
  const said = hint && full === undefined ? `${error}: ${hint}` : error;
  return said.charAt(0).toUpperCase() + said.slice(1);
}

async function ask(path, change) {
  const headers = { accept: "application/json" };
  const how = change === undefined ? { headers }
    : { method: "POST", headers: { ...headers, "content-type": "application/json" }, body: JSON.stringify(change) };
  const answer = await fetch(`api/${path}`, how);
  const body = await answer.json();
  if (answer.status === 401) throw new Refused();
  if (!answer.ok) throw Object.assign(new Error(sentence(body)), { status: answer.status, unknown: "path" in body });
  return body;
}

// Null where nobody answers: the addon is not loaded, or has nothing of the kind. One that fails
// says so in the proxy's log, and takes nothing but its own part off the page.
async function askAddon(path, change) {
  try {
    return await ask(path, change);
  } catch (error) {
    if (change === undefined ? error.status === 404 || error.status >= 500 : error.unknown) return null;
    throw error;
  }
}

async function refresh() {
  if (view.asking) {
    view.again = true;
    return;
  }
  view.asking = true;
  view.again = false;
  const { session, changes } = view;
  const of = session === null ? "" : `&session=${encodeURIComponent(session)}`;
  try {
    const [sessions, { session: shown }, exchanges, totals, saving] = await Promise.all([
      ask(`sessions?limit=${view.sessions}`),
      session === null ? ask("sessions/active") : ask(`sessions/${encodeURIComponent(session)}`),
      ask(`exchanges?limit=${view.rows}${of}`),
      ask("totals?period=today"),
      savings.read(session),
    ]);
    const summaries = await savings.compaction(shown);
    if (changes !== view.changes) return; // asked before the user did something
    show(sessions, shown, exchanges, totals);
    savings.show(saving, totals.today, shown, session !== null, summaries);
  } catch (error) {
    failed(error);
  } finally {
    view.asking = false;
    if (changes !== view.changes) view.next = 0;
    if (view.again) soon();
  }
}

async function about() {
  try {
    showProxy(await ask("status"));
  } catch (error) {
    failed(error);
  }
}

function failed(error) {
  if (error instanceof Refused) {
    stop("The proxy was started again and has a new token: open the address that it printed.");
  } else if (!(error instanceof TypeError)) { // TypeError: it does not answer; the events say so
    notice(error.message);
  }
}

function soon() {
  if (view.timer || document.hidden) return;
  view.timer = setTimeout(() => {
    view.timer = 0;
    view.next = Date.now() + GAP_MS;
    refresh();
  }, Math.max(0, view.next - Date.now()));
}

function atOnce() {
  view.changes += 1;
  view.next = 0;
  clearTimeout(view.timer);
  view.timer = 0;
  soon();
}

// --- live events

function state(kind, words) {
  $("state").dataset.state = kind;
  $("state").textContent = words;
}

function stop(message) {
  view.events?.close();
  view.events = null;
  state("off", "not connected");
  notice(message);
}

function listen() {
  const events = new EventSource("api/events");
  view.events = events;
  events.addEventListener("open", () => {
    view.retry = 1000;
    state("live", "live");
    about();
    soon();
  });
  events.addEventListener("change", soon);
  events.addEventListener("error", () => {
    state("wait", "reconnecting");
    // The browser tries again by itself, but not after an answer that was no stream.
    if (events.readyState === EventSource.CLOSED && view.events === events) {
      setTimeout(async () => {
        await refresh();
        if (view.events === events) listen();
      }, view.retry);
      view.retry = Math.min(view.retry * 2, 30000);
    }
  });
}

function choose(session) {
  view.session = session;
  view.rows = ROWS;
  view.seen = null;
  told(""); // it was about another one
  atOnce();
}

function refused(error) {
  if (error instanceof Refused) failed(error);
  else told(error instanceof TypeError ? "The proxy does not answer." : error.message);
}

savings.begin({ ask: askAddon, told, failed: refused, changed: atOnce });
$("sessions").addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button) choose(button.dataset.id === view.session ? null : button.dataset.id);
});
$("all").addEventListener("click", () => {
  choose(null);
  $("exchanges-title").scrollIntoView({ block: "nearest" });
});
$("sessions-more").addEventListener("click", () => {
  view.sessions = Math.min(view.sessions * 4, 1000);
  atOnce();
});
$("older").addEventListener("click", () => {
  view.rows = Math.min(view.rows + 100, 1000);
  view.seen = null;
  atOnce();
});
document.addEventListener("visibilitychange", soon);
setInterval(() => { // "5 min ago", a new day, the state of the store
  if (document.hidden || view.events === null) return;
  about();
  soon();
}, 60000);
listen();
