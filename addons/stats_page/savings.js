// What was left out of requests, what that saved, and the switches for it. Each part is there only
// while the addon answers that it belongs to.

import { $, ago, el, fill, none, number, short, text, things, time, usd, whole } from "./elements.js";

const MASKS = 20;

const view = {
  span: "today",
  masks: MASKS,
  sanitizer: null, // what it last said of itself
  compaction: null,
  session: null, // the one that the buttons are for
  chosen: false, // by the user; otherwise it is the active one
  busy: false,
};

let api = null; // how the page asks: {ask, told, failed, changed}

export function begin(page) {
  api = page;
}

// --- asking

const id = (session) => encodeURIComponent(session.id);

// `session`: the one whose numbers are shown, null for all; `active`: the one the buttons are for.
export async function read(session) {
  const of = session === null ? "" : `&session=${encodeURIComponent(session)}`;
  const [sanitizer, masks, sums] = await Promise.all([
    api.ask("sanitizer/stats"),
    api.ask(`mask?limit=${view.masks}${of}`),
    session === null && view.span === "today" ? null : api.ask(`totals?${of.slice(1)}`),
  ]);
  return { sanitizer, masks, sums: sums && sums.all };
}

export const compaction = (session) => (session ? api.ask(`compaction/${id(session)}`) : null);

// --- what the page shows

export function show(said, today, session, chosen, summaries) {
  view.sanitizer = said.sanitizer;
  view.compaction = summaries;
  view.session = session;
  view.chosen = chosen;
  $("savings").hidden = said.sanitizer === null && summaries === null;
  if ($("savings").hidden) return;
  $("span").hidden = chosen;
  for (const button of $("span").children) {
    button.setAttribute("aria-pressed", String(button.dataset.id === view.span));
  }
  $("savings-title").replaceChildren(...(chosen ? ["Savings of ", el("bdi", {}, name(session))] : ["Savings"]));
  showSums(said.sums ?? today);
  showSanitizer();
  showMasks(said.masks);
  showCompaction();
}

function name(session) {
  return session.name || session.project || session.id;
}

function showSums(sums) {
  const item = (title, value, note, exact, more = "") =>
    el("div", { class: more || null }, el("dt", {}, title), el("dd", { title: exact }, value, el("small", {}, note)));
  // Of what has no known price the sums have nothing; a zero made of it would be a lie.
  const dollars = (value, unpriced) => (value === null || (unpriced && value === 0) ? none("no price known")
    : unpriced ? `${usd(value)} + ?` : usd(value));
  const without = (note, unpriced) =>
    [note, unpriced ? `${whole.format(unpriced)} unpriced` : ""].filter(Boolean).join(", ");
  const { unpriced_savings: noGain = 0, unpriced_spendings: noCost = 0 } = sums;
  const parts = [
    sums.masked_tokens ? `${short(sums.masked_tokens)} masked` : "",
    sums.compressed_tokens ? `${short(sums.compressed_tokens)} compressed` : "",
  ].filter(Boolean).join(", ");
  const breaks = sums.cache_breaks ? things(sums.cache_breaks, "cache break") : "";
  const recalls = sums.recalls ? things(sums.recalls, "recall") : "";
  const net = sums.saved_usd;
  const unknown = noGain || noCost;
  $("sums").replaceChildren(
    item("Tokens not sent", sums.saved_tokens === null ? "–" : short(sums.saved_tokens), parts,
      sums.saved_tokens === null ? null : whole.format(sums.saved_tokens)),
    item("Would have cost", dollars(sums.gross_saved_usd, noGain), without("gross", noGain), null),
    item("Lost to cache misses", dollars(sums.lost_usd, noGain), without(breaks, noGain), null),
    item("Spent on saving", dollars(sums.spent_usd, noCost), without(recalls, noCost), null),
    item("Net", unknown && net ? `${usd(net)} ± ?` : dollars(net, unknown), "", null,
      unknown || !net ? "" : net > 0 ? "gain" : "loss"));
}

function showSanitizer() {
  const said = view.sanitizer;
  $("sanitizer").hidden = said === null;
  if (said === null) return;
  $("masking").setAttribute("aria-checked", String(said.enabled));
  $("masking").disabled = view.busy;
  const how = said.threshold
    ? `Results over ${things(said.threshold, "token")} are cut to about ${whole.format(said.keep)}; lines already shown are pointed at.`
    : "Lines already shown are pointed at; nothing is cut.";
  $("masking-note").textContent = said.bypass
    ? "The proxy is set to edit nothing (kimi_bypass)."
    : said.enabled ? how : "New results are sent whole. What was masked before stays so, which keeps the provider’s cache.";
  $("flush").hidden = view.session === null;
  $("flush").disabled = view.busy;
  const { reference = 0, cut = 0 } = said.by_kind ?? {};
  $("kept").textContent = said.masks
    ? `${things(said.masks, "original")} kept: ${short(reference)} tokens in references, ${short(cut)} cut.` : "";
}

function showMasks(masks) {
  const rows = masks === null ? [] : masks.masks;
  $("masks-part").hidden = rows.length === 0;
  fill($("masks"), rows.map(maskRow));
  $("masks-more").hidden = rows.length === 0 || masks.next === null || view.masks >= 500;
}

function sizes(before, after) {
  const less = before ? Math.round((100 * (before - after)) / before) : 0;
  return el("td", { class: "n", title: `${things(before, "token")} before, ${whole.format(after)} as sent` },
    el("span", { class: "soft" }, whole.format(before)), " → ", whole.format(after),
    " ", el("small", { class: "share" }, `−${less} %`));
}

function maskRow(mask) {
  const button = el("button", { type: "button", class: "hash", title: "Show the original" }, mask.hash);
  button.dataset.id = mask.hash;
  return el("tr", {},
    el("td", {}, button),
    text(mask.label || null),
    el("td", { class: "soft" }, mask.tags.join(", ")),
    sizes(mask.token_count, mask.sent_tokens),
    el("td", { class: "n soft" }, time(mask.created_at, ago(mask.created_at))));
}

function showCompaction() {
  const said = view.compaction;
  $("compaction").hidden = said === null;
  if (said === null) {
    $("summaries-part").hidden = true;
    return;
  }
  const early = !said.can_compress && isEarly(said);
  $("compress").disabled = view.busy || !(said.can_compress || early);
  $("compress").textContent = `Compress ${view.chosen ? "this" : "the active"} session${early ? " anyway" : ""}`;
  $("compress-note").textContent = fullness(said);
  $("summaries-part").hidden = said.summaries.length === 0;
  fill($("summaries"), said.summaries.map(summaryRow));
}

// Whether only the window says no to it: a person may know better.
function isEarly({ current_percentage: full, threshold }) {
  const { gauge, provider } = view.session;
  return full === null ? gauge.window === null && provider !== null : full < threshold;
}

// The API's hint is worded for programs, too, so it is shown only where the numbers say nothing.
function fullness(said) {
  const { current_percentage: full, threshold, hint } = said;
  const used = full === null ? "" : `${Math.max(0, Math.round(full))} % of the window is in use`;
  if (said.can_compress) return used && `${used}.`;
  if (!isEarly(said)) return [used, hint].filter(Boolean).map((text) => `${text.charAt(0).toUpperCase()}${text.slice(1)}.`).join(" ");
  return full === null
    ? "The model’s window is not known, so nothing says when it is full enough."
    : `${used}; below ${Math.round(threshold)} % it need not be compressed.`;
}

// What a summary says first; as it is sent, all begin alike, and many with a heading.
function firstWords(text) {
  const said = (/<summary>\n([^]*)\n<\/summary>/.exec(text)?.[1] ?? text).trim().split("\n");
  const line = said.find((one) => one.trim() && !/^\s*(#|\*\*[^*]*\*\*$)|:[*_]*\s*$/.test(one)) ?? said[0];
  return line.trim().replace(/^(?:[-*•]|\d+[.)])\s+/, "").replaceAll("**", "");
}

function summaryRow(summary) {
  const open = el("button", { type: "button", title: "Show the summary" }, firstWords(summary.text) || summary.id);
  open.dataset.id = summary.id;
  let last = el("span", { class: "soft" }, "revoked");
  if (summary.revoked_at === null) {
    last = el("button", { type: "button", class: "quiet", title: "Send the messages again that it stands for" }, "Revoke");
    last.dataset.id = `revoke ${summary.id}`;
    last.disabled = view.busy;
  }
  return el("tr", { class: summary.revoked_at === null ? null : "revoked" },
    el("td", {}, open),
    el("td", { class: "soft" }, el("bdi", {}, summary.source === "extract" ? "local extract" : summary.model ?? "–")),
    sizes(summary.tokens_before, summary.tokens_after),
    number(summary.applied),
    el("td", { class: "n soft" }, time(summary.created_at, ago(summary.created_at))),
    el("td", { class: "n" }, last));
}

// --- a text and what was sent in its place

function open(title, about, panes) {
  $("shown-title").textContent = title;
  $("shown-about").textContent = about;
  $("shown-panes").replaceChildren(...panes.map(([caption, lines]) =>
    el("figure", {}, el("figcaption", {}, caption), el("pre", { tabindex: "0" }, ...lines))));
  $("shown").showModal();
  $("shown-panes").scrollTop = 0;
}

// The lines of `one`, those marked that the other text has not.
function marked(one, other, kind) {
  const known = new Set(other.split("\n"));
  const runs = [];
  for (const line of one.split("\n")) {
    const only = !known.has(line);
    const last = runs.at(-1);
    if (last && last.only === only) last.lines.push(line);
    else runs.push({ only, lines: [line] });
  }
  return runs.map(({ only, lines }) => {
    const said = `${lines.join("\n")}\n`;
    return only ? el("mark", { class: kind }, said) : said;
  });
}

async function openMask(hash) {
  const mask = await api.ask(`mask/${encodeURIComponent(hash)}`);
  if (mask === null) return api.told(`The original of ${hash} is no longer kept.`);
  const original = mask.original_content;
  const sent = mask.sent_content ?? null;
  const about = [mask.label, things(mask.token_count, "token")].filter(Boolean).join(" · ");
  if (sent === null) return open(mask.hash, `${about} · mitmweb shows what was sent in its place`, [["Original", [original]]]);
  open(mask.hash, about, [
    ["As sent", marked(sent, original, "ours")],
    ["Original; what was left out is marked", marked(original, sent, "left")],
  ]);
}

function openSummary(wanted) {
  const summary = view.compaction?.summaries.find((one) => one.id === wanted);
  if (summary) open("Summary", `${things(summary.tokens_before, "token")} became ${whole.format(summary.tokens_after)}`, [["As sent", [summary.text]]]);
}

// --- switches

async function change(path, body, done, doing = "") {
  if (view.busy) return;
  view.busy = true;
  api.told(doing);
  showSanitizer();
  showCompaction();
  try {
    const answer = await api.ask(path, body);
    api.told(answer === null ? "The proxy has not got that any more." : done?.(answer) ?? "");
  } catch (error) {
    api.failed(error);
  } finally {
    view.busy = false;
    showSanitizer();
    showCompaction();
    api.changed();
  }
}

const guarded = (handler) => async (event) => {
  try {
    await handler(event);
  } catch (error) {
    api.failed(error);
  }
};

$("masking").addEventListener("click", () => change("sanitizer/toggle", { enabled: !view.sanitizer.enabled }, ({ enabled }) => {
  view.sanitizer.enabled = enabled;
}));
$("flush").addEventListener("click", () => {
  const asked = "Decide anew on all messages of this session? Its next request is sent without the provider’s cache, which costs once.";
  if (confirm(asked)) change("sanitizer/flush", { session: view.session.id }, () => "Decided anew with the session’s next request.");
});
$("compress").addEventListener("click", () => {
  const force = !view.compaction.can_compress;
  const asked = "Compress it already? A summary takes the place of older messages, however little that saves, and the next request is sent without the provider’s cache, which costs once. It can be revoked.";
  if (force && !confirm(asked)) return;
  change(`compress/${id(view.session)}`, { force }, (result) =>
    `Compressed: ${things(result.original_tokens, "token")} became ${whole.format(result.compressed_tokens)}; in force from the next request on.`,
  "Compressing …");
});
$("summaries").addEventListener("click", (event) => {
  const wanted = event.target.closest("button")?.dataset.id;
  if (wanted === undefined) return;
  if (!wanted.startsWith("revoke ")) return openSummary(wanted);
  const asked = "Send the original messages again? The next request is sent without the provider’s cache, which costs once.";
  if (confirm(asked)) change(`compaction/${id(view.session)}/revoke`, { id: wanted.slice(7) }, () => "Revoked: the original messages are sent again.");
});
$("masks").addEventListener("click", guarded(async (event) => {
  const button = event.target.closest("button");
  if (button) await openMask(button.dataset.id);
}));
$("masks-more").addEventListener("click", () => {
  view.masks = Math.min(view.masks * 4, 500);
  api.changed();
});
$("span").addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  view.span = button.dataset.id;
  api.changed();
});
$("shown").addEventListener("click", (event) => {
  if (event.target === $("shown")) $("shown").close(); // beside it
});
