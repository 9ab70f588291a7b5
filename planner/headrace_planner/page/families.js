// Mixture-of-experts models over the years, as their authors published them: [name, family, year with the day of first
// publication as its fraction, routed experts of a layer, of which a token takes, billions of parameters, of which active
// (0: not published), source]. Each row was held against public descriptions of it: experts and parameters as in the
// source named, or its model card; the day is that of the paper, or of the weights where they came first.

const FAMILIES = [
  ["GShard", "Google", 2020.5, 2048, 2, 600, 0, "arXiv 2006.16668"],
  ["Switch-C", "Google", 2021.03, 2048, 1, 1571, 0, "arXiv 2101.03961"],
  ["GLaM", "Google", 2021.95, 64, 2, 1200, 96.6, "arXiv 2112.06905"],
  ["Mixtral 8x7B", "Mistral", 2023.94, 8, 2, 47, 13, "arXiv 2401.04088"],
  ["DeepSeekMoE 16B", "DeepSeek", 2024.03, 64, 6, 16.4, 2.8, "arXiv 2401.06066"],
  ["Grok-1", "xAI", 2024.21, 8, 2, 314, 0, "github.com/xai-org/grok-1"],
  ["DBRX", "Databricks", 2024.24, 16, 4, 132, 36, "databricks.com/blog, March 2024"],
  ["Mixtral 8x22B", "Mistral", 2024.29, 8, 2, 141, 39, "mistral.ai/news/mixtral-8x22b"],
  ["DeepSeek-V2", "DeepSeek", 2024.35, 160, 6, 236, 21, "arXiv 2405.04434"],
  ["DeepSeek-V3", "DeepSeek", 2024.98, 256, 8, 671, 37, "arXiv 2412.19437"],
  ["Llama 4 Maverick", "Meta", 2025.26, 128, 1, 400, 17, "ai.meta.com/blog, April 2025"],
  ["Qwen3-235B-A22B", "Qwen", 2025.32, 128, 8, 235, 22, "arXiv 2505.09388"],
  ["Kimi-K2", "Moonshot", 2025.52, 384, 8, 1040, 32, "arXiv 2507.20534"],
  ["GLM-4.5", "Zhipu", 2025.57, 160, 8, 355, 32, "arXiv 2508.06471"],
  ["gpt-oss-120b", "OpenAI", 2025.59, 128, 4, 116.8, 5.1, "arXiv 2508.10925"],
  ["Qwen3-Next-80B-A3B", "Qwen", 2025.69, 512, 10, 80, 3, "huggingface.co/Qwen, September 2025"],
];
const YEARS = { width: 1000, height: 380, left: 50, right: 30, top: 16, bottom: 34, from: 2020, to: 2026.5 };

function drawFamilies(section) {
  const svg = element("svg", { viewBox: `0 0 ${YEARS.width} ${YEARS.height}`, role: "img",
    "aria-label": "Routed experts of published models over the years; figures in the table below" });
  const x = (year) => YEARS.left + ((year - YEARS.from) / (YEARS.to - YEARS.from)) * (YEARS.width - YEARS.left - YEARS.right);
  const y = scale(4, 4096, YEARS.height - YEARS.bottom, YEARS.top), grid = element("g", { class: "grid" }, svg);
  for (let year = YEARS.from; year < YEARS.to; year++) {
    element("line", { x1: x(year), x2: x(year), y1: YEARS.top, y2: YEARS.height - YEARS.bottom }, grid);
    element("text", { x: x(year), y: YEARS.height - 14, "text-anchor": "middle" }, grid, String(year));
  }
  for (const experts of [4, 16, 64, 256, 1024, 4096]) {
    element("line", { x1: YEARS.left, x2: YEARS.width - YEARS.right, y1: y(experts), y2: y(experts) }, grid);
    element("text", { x: YEARS.left - 8, y: y(experts) + 4, "text-anchor": "end" }, grid, String(experts));
  }
  const taken = FAMILIES.map(([, , year, experts, , size]) => circle(x(year), y(experts), size));
  for (const family of MANY) {
    const points = FAMILIES.filter((row) => row[1] === family).map(([, , year, experts]) => `${x(year)},${y(experts)}`);
    element("polyline", { class: `family ${colourOf(family)}`, points: points.join(" ") }, svg);
  }
  FAMILIES.forEach(([name, family, year, experts, chosen, size], index) => {
    const { r } = taken[index];
    const dot = element("circle", { class: `dot ${colourOf(family)}`, cx: x(year), cy: y(experts), r }, svg);
    element("title", {}, dot, `${name}, ${family}: ${experts} experts of which ${chosen}, ${size} billion parameters`);
  });
  FAMILIES.forEach(([name, , year, experts], index) => labelBeside(svg, name, x(year), y(experts), taken[index].r, taken));
  section.querySelector(".plot").replaceChildren(svg);
  drawFamilyTable(section.querySelector("table"));
}

function circle(px, py, size) {
  const r = 3 + 0.55 * Math.sqrt(size);
  return { r, x: px - r, y: py - r, w: 2 * r, h: 2 * r };
}

/** Families of more than one model here have a colour and a line of their own. */
const MANY = [...new Set(FAMILIES.map((row) => row[1]))].filter((family) => FAMILIES.filter((row) => row[1] === family).length > 1);
const COLOURS = ["projection", "communication", "experts", "attention"];
const colourOf = (family) => (MANY.includes(family) ? COLOURS[MANY.indexOf(family) % COLOURS.length] : "norm");

/** Put a name where it covers no circle and no other name, and remember where. */
function labelBeside(svg, name, px, py, r, taken) {
  const w = name.length * 6.6, h = 14;
  const places = [[r + 4, 0], [-r - 4 - w, 0], [-w / 2, -r - 9], [-w / 2, r + 9], [r + 4, 14], [r + 4, -14],
    [-r - 4 - w, 14], [-r - 4 - w, -14], [-w / 2, r + 24], [-w / 2, -r - 24], [r + 4, 28], [-w, r + 38]];
  const boxes = places.map(([dx, dy]) => ({ x: px + dx, y: py + dy - h / 2, w, h }));
  const isFree = (box) => box.x > YEARS.left && box.x + w < YEARS.width && !taken.some((t) => t.x < box.x + w && box.x < t.x + t.w && t.y < box.y + h && box.y < t.y + t.h);
  const box = boxes.find(isFree) || boxes[0];
  taken.push(box);
  element("text", { class: "dot-label", x: box.x, y: box.y + 11 }, svg, name);
}

function drawFamilyTable(table) {
  const titles = ["model", "year", "experts", "per token", "parameters", "active", "source"];
  const rows = FAMILIES.map(([name, , year, experts, chosen, size, active, source]) => html("tr", {}, ...[
    name, String(Math.floor(year)), String(experts), String(chosen), `${size}e9`, active ? `${active}e9` : "–", source,
  ].map((text, index) => html("td", index > 0 && index < 6 ? { class: "number" } : {}, text))));
  table.replaceChildren(html("thead", {}, html("tr", {}, ...titles.map((title, index) =>
    html("th", index > 0 && index < 6 ? { class: "number" } : {}, title)))), html("tbody", {}, ...rows));
}
