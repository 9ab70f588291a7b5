// One layer as a drawing: its parts in order, how wide experts are spread, which of them a step reads, and each part's time.

const PARTS = [
  ["attention", ({ group }) => group === "attention" || group === "projection"],
  ["norms, rope", ({ group }) => group === "norm"],
  ["router", ({ name }) => name === "router"],
  ["dispatch", ({ name }) => name === "dispatch"],
  ["experts", ({ name }) => name.startsWith("expert_")],
  ["shared", ({ name }) => name === "shared_experts"],
  ["feed-forward", ({ name }) => name === "dense_ffn"],
  ["combine", ({ name, group }) => group === "communication" && name !== "dispatch" && name !== "kv_transfer"],
];
const LAYER = { width: 1000, height: 250, box: 70, grid: 230 };

/** Seconds that a layer's operations of this part take; operations run as often as there are layers of their kind. */
const partSeconds = (result, isPart) => result.operations.filter((operation) => !operation.isOverlapped && isPart(operation))
  .reduce((sum, { seconds, runs }) => sum + seconds / runs, 0);

function drawLayer(section, results) {
  const { layer } = results[1], isMoe = layer.moeLayers > 0;
  const parts = PARTS.map(([name, isPart]) => ({ name, seconds: results.map((result) => partSeconds(result, isPart)) }))
    .filter(({ name, seconds }) => seconds.some((value) => value > 0) && !(isMoe && name === "feed-forward"));
  const svg = element("svg", { viewBox: `0 0 ${LAYER.width} ${LAYER.height}`, role: "img",
    "aria-label": isMoe ? `A layer with ${layer.E} experts, of which a token takes ${layer.K}` : "A dense layer" });
  const grid = isMoe ? LAYER.grid : 0, step = (LAYER.width - 20 - grid) / parts.length;
  // All bars at one scale, so that they can be compared.
  const scale = (step - 14) / Math.max(...parts.flatMap(({ seconds }) => seconds));
  let x = 10;
  for (const { name, seconds } of parts) {
    const width = name === "experts" ? step + grid : step;
    drawPart(svg, name, seconds, x, width, scale);
    if (name === "experts") drawExperts(svg, results, x + 8, width - 28);
    x += width;
  }
  section.querySelector(".plot").replaceChildren(svg);
  section.querySelector(".off").textContent = isMoe
    ? `${count(layer.E)} experts of ${count(layer.N)} × ${count(layer.width)}, ${count(layer.E / layer.ep)} on this GPU; a token takes ` +
      `${layer.K}. A prefill step reads ${results[0].layer.X.toFixed(1)} of this GPU's, with ${perExpert(results[0])} tokens each; a ` +
      `decode step ${results[1].layer.X.toFixed(1)}, with ${perExpert(results[1])}. A square is an expert: dark, decode reads it; light, prefill alone.`
    : `${layer.layers} layers, each with one feed-forward network that every token uses.`;
}

function perExpert(result) {
  const { K, ep, X } = result.layer;
  return Number((result.tokens * K / ep / X).toPrecision(2)).toLocaleString("en-US");
}

function drawPart(svg, name, seconds, x, width, scale) {
  const left = x + 4, inner = width - 14;
  element("rect", { class: "part-box", x: left, y: 10, width: inner, height: name === "experts" ? 118 : LAYER.box, rx: 7 }, svg);
  element("text", { class: "part-name", x: left + inner / 2, y: 28, "text-anchor": "middle" }, svg, name);
  if (x > 20) element("path", { class: "arrow", d: `M${x - 9} 45h11m-4 -4l4 4l-4 4` }, svg);
  ["prefill", "decode"].forEach((phase, index) => {
    const y = 146 + 46 * index;
    element("rect", { class: `phase-${phase}`, x: left, y, width: Math.max(2, scale * seconds[index]), height: 14, rx: 3 }, svg);
    element("text", { class: "part-time", x: left, y: y + 30 }, svg, time(seconds[index] || 1e-12).replace(/^0.001 ns$/, "–"));
  });
}

/** This GPU's experts as squares, as many dark as a decode step reads, as many light as a prefill step reads besides. */
function drawExperts(svg, [prefill, decode], x, width) {
  const { E, ep } = decode.layer, here = Math.max(1, Math.round(E / ep)), shown = Math.min(here, 256);
  const columns = Math.ceil(Math.sqrt((shown * width) / 82)), size = Math.min(22, width / columns, 82 / Math.ceil(shown / columns));
  for (let index = 0; index < shown; index++) {
    const of = (result) => index + 0.5 < (result.layer.X * shown) / here;
    const kind = of(decode) ? "read" : of(prefill) ? "read-prefill" : "idle";
    element("rect", { class: `expert ${kind}`, x: x + (index % columns) * size, y: 38 + Math.floor(index / columns) * size,
      width: size * 0.8, height: size * 0.8, rx: size * 0.15 }, svg);
  }
}
