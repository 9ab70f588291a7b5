// Numbers as people read them, and the parts of the page that are not the plot.

function si(value) {
  for (const [factor, prefix] of [[1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]])
    if (Math.abs(value) >= factor) return `${Number((value / factor).toPrecision(3))} ${prefix}`;
  return `${Number(value.toPrecision(3))} `;
}

function time(value) {
  for (const [factor, unit] of [[1, "s"], [1e-3, "ms"], [1e-6, "µs"]])
    if (value >= factor) return `${Number((value / factor).toPrecision(3))} ${unit}`;
  return `${Number((value / 1e-9).toPrecision(3))} ns`;
}

const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`;
const gib = (bytes) => (bytes / 2 ** 30).toFixed(bytes < 10 * 2 ** 30 ? 1 : 0);
const count = (value) => Math.round(value).toLocaleString("en-US");

function html(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function card(label, value, note) {
  return html("div", { class: "card" }, html("span", { class: "label" }, label), html("strong", {}, value),
    html("span", { class: "note" }, note));
}

/** The two figures that people come for. */
function drawAnswer(host, results, setting) {
  host.replaceChildren(...results.map((result) => {
    const [bound, share] = Object.entries(result.bounds).reduce((most, one) => (one[1] > most[1] ? one : most));
    const what = result.phase === "prefill"
      ? `${count(setting.prompts)} × ${count(setting.context)} tokens` : `${count(setting.batch)} sequences of ${count(setting.context)}`;
    return html("div", { class: result.phase }, html("span", { class: "label" }, `${result.phase}, ${what}`),
      html("strong", {}, time(result.seconds)), html("span", { class: "note" }, `${percent(share)} ${bound}-bound`),
      html("span", { class: "note" }, `${count(result.summary.tokens_per_s_per_gpu)} tokens/s per GPU`));
  }));
}

/** Every machine's critical intensities; a click chooses it. They are drawn once, then one is marked. */
function drawMachines(host, setting, choose) {
  if (host.children.length) {
    for (const card of host.children) card.setAttribute("aria-pressed", String(card.firstChild.textContent === setting.hardware));
    return;
  }
  host.replaceChildren(...Object.entries(CONTENT.hardware).map(([name, hardware]) => {
    const dtypes = ["bf16", "fp8"].filter((dtype) => dtype === "bf16" || hardware.flops.fp8 !== hardware.flops.bf16);
    const button = html("button", { type: "button", class: "card", "aria-pressed": String(name === setting.hardware) },
      html("span", { class: "label" }, name),
      ...dtypes.map((dtype) => html("strong", {}, (hardware.flops[dtype] / hardware.memory).toFixed(0), html("small", {}, ` ${dtype}`))),
      html("span", { class: "note" }, `${si(hardware.memory)}B/s, ${(hardware.memoryBytes / 1e9).toFixed(0)} GB`));
    button.addEventListener("click", () => choose(name));
    return button;
  }));
}

function drawCards(host, result, setting) {
  const { summary } = result;
  const hardware = CONTENT.hardware[setting.hardware];
  const [bound, share] = Object.entries(result.bounds).reduce((most, one) => (one[1] > most[1] ? one : most));
  const held = result.weightBytes + result.cacheBytes;
  const memory = card("Memory per GPU, GiB", `${gib(held)} of ${gib(hardware.memoryBytes)}`,
    `${gib(result.weightBytes)} weights, ${gib(result.cacheBytes)} cache`);
  if (held > hardware.memoryBytes) memory.classList.add("over");
  host.replaceChildren(
    card(result.phase === "prefill" ? "Step, so TTFT at best" : "Step, so ITL at best", time(result.seconds),
      `${percent(share)} ${bound}-bound`),
    card("Tokens/s per GPU", count(summary.tokens_per_s_per_gpu), `${count(summary.tokens_per_s)} per worker`),
    card("Cost per million", `$${summary.cost_per_million_tokens.toPrecision(3)}`, `at $${hardware.cost.toFixed(2)} per GPU-hour`),
    memory);
}

function drawBar(host, result) {
  const groups = GROUPS.map((group) => [group, result.operations.filter((operation) => operation.group === group)
    .reduce((sum, operation) => sum + operation.share, 0)]).filter(([, share]) => share > 0.0005);
  host.replaceChildren(...groups.map(([group, share]) => {
    const part = html("div", { class: `part ${group}`, style: `flex: ${share} 0 0`, title: `${group} ${percent(share)}` });
    const text = `${group} ${percent(share)}`;
    if (share * host.clientWidth > 6.4 * text.length + 10) part.append(html("span", {}, text));
    return part;
  }));
}

function formulaRow(operation, columns) {
  const parts = Object.entries({ flops: "FLOPs", bytes: "bytes", sent: "sent" }).filter(([key]) => operation.shown[key])
    .map(([key, label]) => html("div", {}, html("b", {}, `${label} `), html("code", {}, operation.shown[key]),
      ` × ${operation.runs} runs = ${si(operation[key])}${key === "flops" ? "FLOP" : "B"}`));
  return html("tr", { class: "formula", hidden: "" }, html("td", { colspan: columns }, ...parts));
}

function drawTable(host, result, measured) {
  const isMeasured = measured.length > 0;
  host.classList.toggle("is-measured", isMeasured);
  const titles = ["operation", "FLOP/byte", "bound by", "time", "share", ...(isMeasured ? ["measured"] : [])];
  const body = html("tbody", {});
  const greatest = Math.max(...result.operations.map(({ share }) => share));
  for (const operation of [...result.operations].sort((a, b) => a.intensity - b.intensity)) {
    const pair = measured.find((one) => one.operation === operation);
    const share = html("td", { class: "number share" }, html("i", { class: operation.group,
      style: `width: ${((66 * operation.share) / greatest).toFixed(1)}px` }), operation.isOverlapped ? "beside" : percent(operation.share));
    const row = html("tr", { "data-operation": operation.name, tabindex: "0", "aria-expanded": "false" },
      html("td", {}, html("i", { class: `swatch ${operation.group}` }), operation.name.replaceAll("_", " ")),
      html("td", { class: "number" }, operation.intensity ? String(Number(operation.intensity.toPrecision(4))) : "–"),
      html("td", { class: `bound ${operation.bound}` }, operation.bound),
      html("td", { class: "number" }, time(operation.seconds)), share);
    if (isMeasured) row.append(html("td", { class: "number" }, pair
      ? `${time(pair.point.seconds)} · ${percent(operation.seconds / pair.point.seconds)}` : ""));
    const formula = formulaRow(operation, titles.length);
    const toggle = () => row.setAttribute("aria-expanded", String((formula.hidden = !formula.hidden) === false));
    row.addEventListener("click", toggle);
    row.addEventListener("keydown", (event) => { if (event.key === "Enter") toggle(); });
    body.append(row, formula);
  }
  host.replaceChildren(html("thead", {}, html("tr", {}, ...titles.map((title, index) =>
    html("th", index === 1 || index > 2 ? { class: "number" } : {}, title)))), body);
}

/** Say in numbers why prefill and decode belong on different workers. */
function drawReason(host, prefill, decode, setting) {
  const twice = (phase, key, one) => predict(phase, { ...setting, [key]: 2 * setting[key] }).seconds / one.seconds;
  const part = (result, bound) => percent(result.bounds[bound] || 0);
  const steps = prefill.seconds / decode.seconds;
  const transfer = prefill.operations.find((operation) => operation.isOverlapped);
  const bold = (text) => html("b", {}, text);
  host.replaceChildren(
    html("p", {}, "Prefill is bound by compute for ", bold(part(prefill, "compute")), " of its time, decode by memory for ",
      bold(part(decode, "memory")), ". Twice the prompts make a prefill step ", bold(`${twice("prefill", "prompts", prefill).toFixed(2)}×`),
      " as long; twice the sequences make a decode step ", bold(`${twice("decode", "batch", decode).toFixed(2)}×`), " as long."),
    html("p", {}, "On one worker, each prefill of this size stops every stream for ", bold(time(prefill.seconds)), ", the time of ",
      bold(steps >= 10 ? count(steps) : steps.toFixed(1)), " decode steps. Apart, the cache must travel: ", bold(`${si(transfer.sent)}B`), " per GPU, ",
      bold(time(transfer.seconds)), " at the network's roof, ",
      transfer.seconds <= prefill.seconds ? "hidden behind the prefill that makes it." : "longer than the prefill that makes it."));
}
