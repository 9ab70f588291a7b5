// State is the URL's hash; a control changes the state, the state draws the page.

const DEFAULTS = {
  kv: "auto", mla: "auto", routing: CONTENT.routings[0], cached: 0, hidden: 0, experts: 0, chosen: 0, width: 0, heads: 0,
  ...CONTENT.first,
};
const LIMITS = { batch: [1, 65536], prompts: [1, 4096], context: [16, 1048576], cached: [0, 1048575],
  hidden: [0, 65536], experts: [0, 4096], chosen: [0, 256], width: [0, 131072], heads: [0, 1024] };
const POWERS = [1, 2, 4, 8, 16, 32, 64, 128, 256];
const CHOICES = {
  model: Object.keys(CONTENT.models), hardware: Object.keys(CONTENT.hardware),
  dtype: ["bf16", "fp8", "fp32"], kv: ["auto", "bf16", "fp8", "fp32"], mla: ["auto", "naive", "absorbed"],
  routing: CONTENT.routings, tp: POWERS.slice(0, 6), dp: POWERS,
};
const control = (name) => document.getElementById(name);

function readHash() {
  const setting = { ...DEFAULTS };
  for (const [name, text] of new URLSearchParams(location.hash.slice(1))) {
    if (!(name in setting)) continue;
    const value = typeof DEFAULTS[name] === "number" ? Number(text) : text;
    const [low, high] = LIMITS[name] || [];
    if (LIMITS[name] ? Number.isInteger(value) && value >= low && value <= high : name === "ep" || CHOICES[name].includes(value))
      setting[name] = value;
  }
  return valid(setting);
}

/** Make what can't be chosen together fit: EP divides the GPUs and needs an expert per rank; routing needs experts. */
function valid(setting) {
  const { routing, symbols } = CONTENT.models[setting.model];
  for (const name of ["experts", "chosen", "width"]) if (!routing) setting[name] = 0;
  for (const [name, symbol] of Object.entries(OWN)) if (setting[name] === symbols[symbol]) setting[name] = 0;
  const experts = setting.experts || symbols.E;
  if ((setting.chosen || symbols.K) > experts) setting.chosen = experts;
  if (setting.experts || setting.chosen) setting.routing = "uniform";
  const possible = expertDegrees(setting);
  if (!possible.includes(setting.ep)) setting.ep = possible.filter((ep) => ep < setting.ep).pop() || 1;
  if (routing && !routing[setting.routing]) setting.routing = "uniform";
  setting.cached = Math.min(setting.cached, setting.context - 1);
  return setting;
}

function expertDegrees(setting) {
  const { routing } = CONTENT.models[setting.model];
  const fits = setting.experts ? (ep) => setting.experts % ep === 0 : (ep) => !routing || ep in Object.values(routing).find(Boolean);
  return POWERS.filter((ep) => (setting.tp * setting.dp) % ep === 0 && fits(ep));
}

function writeHash(setting) {
  const changed = Object.entries(setting).filter(([name, value]) => value !== DEFAULTS[name]);
  const hash = new URLSearchParams(changed).toString();
  history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search);
}

function fill(name, choices) {
  control(name).replaceChildren(...choices.map((choice) => html("option", { value: choice }, String(choice))));
}

function showControls(setting) {
  fill("ep", expertDegrees(setting));
  for (const name of Object.keys(DEFAULTS)) control(name).value = setting[name];
  for (const name of ["batch", "prompts", "context"]) control(`${name}-slider`).value = Math.log2(setting[name]);
  const model = CONTENT.models[setting.model];
  control("mla").disabled = !model.isMla;
  control("routing").disabled = control("ep").disabled = !model.routing;
  for (const [name, symbol] of Object.entries(OWN)) {
    const value = setting[name] || model.symbols[symbol], isNone = !model.routing && name !== "hidden" && name !== "heads";
    control(name).value = isNone ? "" : value;
    control(`${name}-slider`).value = name === "chosen" ? value : Math.log2(value || 1);
    control(name).disabled = control(`${name}-slider`).disabled = isNone;
  }
  control("as-published").hidden = !Object.keys(OWN).some((name) => setting[name]);
  document.querySelector("#setting summary").textContent = `${nameOf(setting)} on ${setting.hardware}, ${setting.dtype}, ` +
    `TP${setting.tp} DP${setting.dp} EP${setting.ep}: change`;
  const hardware = CONTENT.hardware[setting.hardware];
  control("source").textContent = `${setting.hardware}: ${si(hardware.flops[setting.dtype])}FLOP/s ${setting.dtype}, ` +
    `${si(hardware.memory)}B/s memory, ${si(hardware.link)}B/s link, ${si(hardware.network)}B/s network. ${hardware.source}.`;
}

/** Pair this phase's operations with measurements; what a measurement does not say is as predicted. */
function measuredOf(result) {
  if (!CONTENT.measured) return [];
  return CONTENT.measured.points.filter((point) => point.phase === result.phase).flatMap((point) => {
    const operation = result.operations.find(({ name }) => name === point.operation);
    return operation ? [{ point, operation, flops: point.flops || operation.flops, bytes: point.bytes || operation.bytes }] : [];
  });
}

const nameOf = (setting) => setting.model + (Object.keys(OWN).some((name) => setting[name]) ? ", changed" : "");

function draw(setting) {
  const results = ["prefill", "decode"].map((phase) => predict(phase, setting));
  const measured = results.map(measuredOf);
  const range = plotRange(results, CONTENT.hardware[setting.hardware], measured.flat());
  results.forEach((result, index) => {
    const part = (name) => document.querySelector(`#${result.phase} .${name}`);
    drawCards(part("cards"), result, setting);
    drawBar(part("bar"), result);
    drawPlot(part("plot"), result, setting, range, measured[index]);
    const off = result.operations.filter((operation) => !operation.flops || !operation.bytes);
    part("off").textContent = `Move bytes only, so not on the plot: ${off.map(({ name }) => name.replaceAll("_", " ")).join(", ")}.`;
    drawTable(part("operations"), result, measured[index]);
  });
  drawReason(control("reason"), results[0], results[1], setting);
  drawAnswer(control("answer"), results, setting);
  drawLayer(control("layer"), results);
  drawMachines(document.querySelector("#machines .cards"), setting, (hardware) => update({ hardware }));
  document.title = `${nameOf(setting)} on ${setting.hardware}: prefill ${time(results[0].seconds)}, decode ${time(results[1].seconds)} · Headrace roofline`;
  document.documentElement.dataset.drawn = String(Number(document.documentElement.dataset.drawn || 0) + 1);
}

/** Copy a text; true if that went well. A page that came over plain http has no clipboard of its own. */
async function copy(text) {
  try {
    if (navigator.clipboard) return await navigator.clipboard.writeText(text), true;
  } catch { /* not allowed: the old way may be */ }
  const box = html("textarea", { readonly: "", style: "position: fixed; opacity: 0" }, text);
  document.body.append(box);
  box.select();
  const isCopied = document.execCommand("copy");
  box.remove();
  return isCopied;
}

let setting = readHash();

function update(changes) {
  setting = valid({ ...setting, ...changes });
  writeHash(setting);
  showControls(setting);
  draw(setting);
}

function connect() {
  for (const [name, choices] of Object.entries(CHOICES)) fill(name, choices);
  for (const name of Object.keys(DEFAULTS)) {
    control(name).addEventListener("change", ({ target }) => {
      if (!LIMITS[name]) return update({ [name]: typeof DEFAULTS[name] === "number" ? Number(target.value) : target.value });
      const [low, high] = LIMITS[name];
      update({ [name]: Math.min(high, Math.max(low, Math.round(Number(target.value)) || low)) });
    });
  }
  for (const name of ["batch", "prompts", "context", ...Object.keys(OWN)])
    control(`${name}-slider`).addEventListener("input", ({ target }) =>
      update({ [name]: name === "chosen" ? Number(target.value) : Math.round(2 ** Number(target.value)) }));
  control("as-published").addEventListener("click", () => update(Object.fromEntries(Object.keys(OWN).map((name) => [name, 0]))));
  control("model").addEventListener("change", () => control("as-published").click());
  window.addEventListener("hashchange", () => { setting = readHash(); showControls(setting); draw(setting); });
  control("share").addEventListener("click", async () => {
    control("share").textContent = await copy(location.href) ? "Copied" : "Copy it from the address bar";
    setTimeout(() => { control("share").textContent = "Copy link"; }, 1500);
  });
  for (const phase of ["prefill", "decode"]) {
    const section = document.getElementById(phase);
    section.addEventListener("mouseover", ({ target }) => {
      const name = target.closest("[data-operation]")?.dataset.operation;
      for (const node of section.querySelectorAll("[data-operation]")) node.classList.toggle("is-hot", node.dataset.operation === name);
    });
  }
  if (CONTENT.measured) {
    control("measured").hidden = false;
    control("measured").textContent = `Diamonds are measured: ${CONTENT.measured.source}.`;
  }
  // A phone's first screen is for the answer.
  if (matchMedia("(max-width: 620px)").matches) control("setting").open = false;
  drawFamilies(control("families"));
  showControls(setting);
  draw(setting);
}

connect();
