// A log-log roofline as SVG: bandwidth slope, compute ceilings, one dot per operation, diamonds for what was measured.

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 640, HEIGHT = 380;
const FRAME = { left: 58, right: 16, top: 18, bottom: 42 };
const GROUPS = ["projection", "attention", "experts", "communication", "norm", "vocabulary"];

function element(name, attributes, parent, text) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  if (parent) parent.append(node);
  return node;
}

function scale(low, high, from, to) {
  const [a, b] = [Math.log10(low), Math.log10(high)];
  return (value) => from + ((Math.log10(value) - a) / (b - a)) * (to - from);
}

function decades(low, high) {
  const all = [];
  for (let power = Math.ceil(Math.log10(low) - 1e-9); power <= Math.log10(high) + 1e-9; power++) all.push(10 ** power);
  return all;
}

function axes(svg, x, y, range) {
  const grid = element("g", { class: "grid" }, svg);
  for (const value of decades(range.x[0], range.x[1])) {
    element("line", { x1: x(value), x2: x(value), y1: FRAME.top, y2: HEIGHT - FRAME.bottom }, grid);
    element("text", { x: x(value), y: HEIGHT - FRAME.bottom + 16, "text-anchor": "middle" }, grid, si(value));
  }
  for (const value of decades(range.y[0], range.y[1])) {
    element("line", { x1: FRAME.left, x2: WIDTH - FRAME.right, y1: y(value), y2: y(value) }, grid);
    element("text", { x: FRAME.left - 8, y: y(value) + 4, "text-anchor": "end" }, grid, si(value));
  }
  const middle = (FRAME.left + WIDTH - FRAME.right) / 2;
  element("text", { x: middle, y: HEIGHT - 6, "text-anchor": "middle", class: "axis" }, svg, "FLOP per byte of memory traffic");
  element("text", { x: 13, y: HEIGHT / 2 - 10, "text-anchor": "middle", class: "axis",
    transform: `rotate(-90 13 ${HEIGHT / 2 - 10})` }, svg, "FLOP/s per GPU");
}

function roofs(svg, x, y, range, hardware, dtypes) {
  const top = Math.max(...dtypes.map((dtype) => hardware.flops[dtype]));
  const floorX = Math.max(range.x[0], range.y[0] / hardware.memory);
  element("polygon", { class: "under", points: [[floorX, Math.max(range.y[0], floorX * hardware.memory)],
    [top / hardware.memory, top], [range.x[1], top], [range.x[1], range.y[0]], [floorX, range.y[0]]]
    .map(([a, b]) => `${x(a)},${y(b)}`).join(" ") }, svg);
  element("line", { class: "roof", x1: x(floorX), y1: y(floorX * hardware.memory),
    x2: x(top / hardware.memory), y2: y(top) }, svg);
  const ceilings = [...dtypes].sort((a, b) => hardware.flops[b] - hardware.flops[a]);
  ceilings.forEach((dtype, index) => {
    const peak = hardware.flops[dtype], ridge = peak / hardware.memory;
    element("line", { class: "roof", x1: x(ridge), x2: WIDTH - FRAME.right, y1: y(peak), y2: y(peak) }, svg);
    element("line", { class: "ridge", x1: x(ridge), x2: x(ridge), y1: y(peak), y2: HEIGHT - FRAME.bottom }, svg);
    // The corner above the slope is empty whatever is drawn.
    element("text", { class: "roof-label", x: FRAME.left + 8, y: FRAME.top + 14 + 16 * index }, svg,
      `${dtype} ${si(peak)}FLOP/s, reached above ${ridge.toFixed(0)} FLOP/byte`);
  });
  element("text", { class: "roof-label", x: FRAME.left + 8, y: FRAME.top + 14 + 16 * ceilings.length }, svg,
    `${si(hardware.memory)}B/s of memory`);
}

/** Put each label where it covers neither another nor a dot; leave it out if there is no such place. */
function placeLabels(svg, dots) {
  const taken = dots.map(({ px, py, r }) => ({ x: px - r, y: py - r, w: 2 * r, h: 2 * r }));
  taken.push({ x: FRAME.left, y: FRAME.top, w: 300, h: 52 });
  const clear = (box) => box.x > FRAME.left && box.x + box.w < WIDTH - FRAME.right && box.y > FRAME.top
    && box.y + box.h < HEIGHT - FRAME.bottom
    && !taken.some((t) => box.x < t.x + t.w && t.x < box.x + box.w && box.y < t.y + t.h && t.y < box.y + box.h);
  for (const { px, py, r, operation } of [...dots].sort((a, b) => b.operation.share - a.operation.share).slice(0, 8)) {
    if (operation.share < 0.01) break;
    const text = operation.name.replaceAll("_", " "), w = text.length * 6 + 4, h = 14;
    const places = [];
    for (const dy of [0, -18, 18, -34, 34, -50, 50, 66, 82])
      for (const shift of dy ? [r + 5, -r - 5 - w, -w / 2, 30, -30 - w, 70, -70 - w] : [r + 5, -r - 5 - w])
        places.push({ x: px + shift, y: py - h / 2 + dy });
    const found = places.find(({ x, y }) => clear({ x, y, w, h }));
    if (!found) continue;
    taken.push({ ...found, w, h });
    if (Math.abs(found.y + h / 2 - py) > 10) {
      const toX = Math.min(Math.max(px, found.x), found.x + w - 4), toY = found.y > py ? found.y : found.y + h;
      element("line", { class: "leader", x1: px, y1: py, x2: toX, y2: toY }, svg);
    }
    element("text", { class: "dot-label", x: found.x, y: found.y + 11 }, svg, text);
  }
}

function drawMeasured(svg, x, y, pairs) {
  for (const { operation, point, flops, bytes } of pairs) {
    const [px, py] = [x(flops / bytes), y(flops / point.seconds)];
    element("line", { class: "miss", x1: px, y1: py, x2: x(operation.intensity), y2: y(operation.flops / operation.seconds) }, svg);
    const mark = element("path", { class: `measured ${operation.group}`, "data-operation": operation.name,
      d: `M${px} ${py - 7}L${px + 7} ${py}L${px} ${py + 7}L${px - 7} ${py}Z` }, svg);
    element("title", {}, mark, `${operation.name}: measured ${time(point.seconds)}, ` +
      `${((100 * operation.seconds) / point.seconds).toFixed(0)} % of the roof`);
  }
}

/** Draw one phase; `range` is shared by both phases, so that they can be compared. */
function drawPlot(host, result, setting, range, measured) {
  const hardware = CONTENT.hardware[setting.hardware];
  const svg = element("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img",
    "aria-label": `Roofline of ${result.phase}: FLOP/s over FLOP per byte, both logarithmic` });
  const x = scale(range.x[0], range.x[1], FRAME.left, WIDTH - FRAME.right);
  const y = scale(range.y[0], range.y[1], HEIGHT - FRAME.bottom, FRAME.top);
  const dtypes = [...new Set([setting.dtype, CONTENT.dtypes[setting.dtype].activation])];
  roofs(svg, x, y, range, hardware, dtypes);
  axes(svg, x, y, range);
  const dots = result.operations.filter((operation) => operation.flops && operation.bytes).map((operation) => ({
    operation, px: x(operation.intensity), py: y(operation.flops / operation.seconds),
    r: 4 + 13 * Math.sqrt(operation.share),
  }));
  for (const { operation, px, py, r } of [...dots].sort((a, b) => b.r - a.r)) {
    const dot = element("circle", { class: `dot ${operation.group}`, cx: px, cy: py, r,
      "data-operation": operation.name }, svg);
    element("title", {}, dot, `${operation.name}\n${operation.intensity.toPrecision(3)} FLOP/byte · ${operation.bound}-bound\n` +
      `${time(operation.seconds)} · ${percent(operation.share)} of the step`);
  }
  drawMeasured(svg, x, y, measured.filter(({ flops, bytes }) => flops && bytes));
  placeLabels(svg, dots);
  host.replaceChildren(svg);
}

/** Axes that hold both phases' operations and the ridge, in whole decades. */
function plotRange(results, hardware, measured) {
  const shown = results.flatMap((result) => result.operations.filter((operation) => operation.flops && operation.bytes));
  const peak = Math.max(...Object.values(hardware.flops));
  const xs = [...shown.map((operation) => operation.intensity), peak / hardware.memory];
  const ys = [...shown.map((operation) => operation.flops / operation.seconds), peak,
    ...measured.filter(({ flops }) => flops).map(({ flops, point }) => flops / point.seconds)];
  const down = (value) => 10 ** Math.floor(Math.log10(value));
  return { x: [down(0.7 * Math.min(...xs)), 10 * down(Math.max(...xs))], y: [down(0.7 * Math.min(...ys)), 6 * peak] };
}
