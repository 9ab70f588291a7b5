"use strict";
// Evaluates the formulas that Python gave (headrace_core/roofline/formula.py); has none of its own.

const CONTENT = JSON.parse(document.getElementById("content").textContent);

const FUNCTIONS = { ceil: Math.ceil, max: Math.max, min: Math.min, pow: Math.pow };
const compiled = new Map();

function evaluate(formula, symbols) {
  if (!compiled.has(formula)) {
    const body = formula.replace(/[A-Za-z_]\w*/g, (name) => (name in FUNCTIONS ? `f.${name}` : `s.${name}`));
    compiled.set(formula, new Function("s", "f", `return ${body}`));
  }
  return compiled.get(formula)(symbols, FUNCTIONS);
}

function evaluateAll(formulas, symbols) {
  return Object.fromEntries(Object.entries(formulas).map(([name, text]) => [name, evaluate(text, symbols)]));
}

function routingSymbols(model, setting) {
  if (!model.routing) return { hot: 1, distinct: () => 0 };
  if (setting.experts || setting.chosen) {
    // Another number of experts than the model's: any of them is as likely to be chosen.
    const { E, K } = { ...model.symbols, ...ownSizes(setting) };
    return { hot: 1, distinct: (tokens) => (E / setting.ep) * (1 - Math.pow(1 - K / E, tokens)) };
  }
  const { hot, busiest } = model.routing[setting.routing][setting.ep];
  return { hot, distinct: (tokens) => busiest.reduce((sum, [q, n]) => sum + n * (1 - Math.pow(1 - q, tokens)), 0) };
}

/** Sizes of a model of the reader's own; 0 is the published model's. Values are symbols of the formulas. */
const OWN = { hidden: "N", experts: "E", chosen: "K", width: "expert_width", heads: "heads" };

function ownSizes(setting) {
  return Object.fromEntries(Object.entries(OWN).filter(([name]) => setting[name]).map(([name, symbol]) => [symbol, setting[name]]));
}

function load(phase, setting) {
  const batch = phase === "prefill" ? setting.prompts : setting.batch;
  const cached = phase === "prefill" ? Math.min(setting.cached, setting.context - 1) : 0;
  const fresh = phase === "prefill" ? setting.context - cached : 1;
  const symbols = { batch, cached, new: fresh, context_total: batch * setting.context };
  // `new` is a word of JavaScript, but s.new is not.
  return { ...CONTENT.noLoad, ...evaluateAll(CONTENT.loads[phase], symbols) };
}

function symbolsOf(phase, setting) {
  const model = CONTENT.models[setting.model];
  const weights = CONTENT.dtypes[setting.dtype];
  const cache = setting.kv === "auto" ? CONTENT.dtypes[weights.activation] : CONTENT.dtypes[setting.kv];
  const symbols = {
    ...model.symbols, ...ownSizes(setting), ...load(phase, setting), ...routingSymbols(model, setting),
    tp: setting.tp, dp: setting.dp, ep: setting.ep,
    w: weights.itemsize, a: CONTENT.dtypes[weights.activation].itemsize, c: cache.itemsize,
  };
  for (const [name, formula] of Object.entries(CONTENT.derived)) symbols[name] = evaluate(formula, symbols);
  return symbols;
}

function operationOf(row, symbols, setting, hardware) {
  const runs = evaluate(row.runs, symbols);
  const activations = CONTENT.dtypes[setting.dtype].activation;
  const dtype = { weights: setting.dtype, activations, cache: setting.kv === "auto" ? activations : setting.kv }[row.math];
  const total = {
    flops: runs * evaluate(row.flops, symbols), bytes: runs * evaluate(row.bytes, symbols),
    sent: runs * evaluate(row.sent, symbols), span: evaluate(row.span, symbols),
    choices: evaluate(row.choices, symbols), hops: evaluate(row.hops, symbols), runs,
    peak: hardware.flops[dtype], memory: hardware.memory, link: hardware.link, network: hardware.network,
    domain: hardware.domain, start: hardware.start, hop: hardware.hop, network_hop: hardware.networkHop,
  };
  const resources = Object.entries(evaluateAll(CONTENT.roof, total));
  const [bound, seconds] = resources.reduce((slowest, one) => (one[1] > slowest[1] ? one : slowest));
  return {
    name: row.name, group: row.group, shown: row.shown, isOverlapped: row.isOverlapped, runs, dtype, bound,
    flops: total.flops, bytes: total.bytes, sent: total.sent, intensity: total.bytes ? total.flops / total.bytes : 0,
    seconds: seconds + runs * hardware.overhead,
  };
}

/** What a step of `phase` costs under `setting`, as `headrace roofline --json` says it. */
function predict(phase, setting) {
  const model = CONTENT.models[setting.model];
  const hardware = CONTENT.hardware[setting.hardware];
  const symbols = symbolsOf(phase, setting);
  const operations = CONTENT.tables[model.tables[phase][setting.mla]]
    .map((row) => operationOf(CONTENT.rows[row], symbols, setting, hardware))
    .filter((operation) => operation.flops || operation.bytes || operation.sent);
  const sum = (list) => list.reduce((total, operation) => total + operation.seconds, 0);
  const seconds = sum(operations.filter((operation) => !operation.isOverlapped));
  const bounds = {};
  for (const operation of operations) {
    operation.share = operation.isOverlapped ? 0 : operation.seconds / seconds;
    bounds[operation.bound] = (bounds[operation.bound] || 0) + operation.share;
  }
  const tokens = symbols.A, { E, K, N, X, ep, expert_width: width } = symbols;
  const figures = { tokens, seconds, gpus: symbols.n, cost: hardware.cost };
  return {
    phase, operations, seconds, bounds, tokens, layer: { E, K, N, X, ep, width, layers: symbols.layers, moeLayers: symbols.moe_layers },
    summary: evaluateAll(CONTENT.summary, figures),
    transferSeconds: sum(operations.filter((operation) => operation.isOverlapped)),
    weightBytes: evaluate(model.weightBytes, symbols),
    cacheBytes: (evaluate(model.cachedBytes, symbols) * (symbols.prefill_context + symbols.decode_context)) / symbols.dp,
  };
}
