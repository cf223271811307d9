"use strict";
// Small drawing tools. Text is only ever set as text (never as markup), so nothing in the data can become a tag.

const SVG = document.getElementById("svg").namespaceURI;
const STAGES = ["base", "sft", "phase1", "phase2", "phase3", "phase4", "phase5", "phase6"];
const stageClass = (name) => "c-" + (STAGES.includes(name.split("-")[0]) ? name.split("-")[0] : "other");

function fill(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "on") for (const [event, handler] of Object.entries(value)) node.addEventListener(event, handler);
    else if (value !== null && value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}
const h = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const s = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

function format(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e15) return value.toLocaleString("en-US");
  if (size >= 1e6) return value.toExponential(2);
  if (size >= 1000) return Math.round(value).toLocaleString("en-US");
  if (size < 1e-3) return value.toExponential(2);
  return String(Number(value.toPrecision(4)));
}
const accuracyText = (value) => (value === null || value === undefined ? "–" : value.toFixed(3));
const tokensText = (upper, lower) => (upper === null ? "> " + format(lower) : format(lower + 1) + "–" + format(upper));

function slotLabels(uppers, slot) {
  // Ranges where they fit side by side at 8 units a letter, else upper bounds; where those don't fit either, on two lines by turns.
  const fits = (labels) => labels.every((label) => label.length * 8 < slot);
  const ranges = uppers.map((upper, at) => tokensText(upper, at ? uppers[at - 1] : 0));
  const bounds = uppers.map((upper, at) => (upper === null ? "> " + format(uppers[at - 1] ?? 0) : "≤ " + format(upper)));
  const labels = fits(ranges) ? ranges : bounds, turns = !fits(labels);
  return labels.map((label, at) => ({ label, line: turns ? at % 2 : 0, turns }));
}

function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.75);
  const found = [];
  for (let index = Math.ceil(low / step - 1e-9); index * step <= high + step * 1e-9; index++) found.push(Number((index * step).toPrecision(12)));
  return found;
}

function runningMean(values, stages, width) {
  // Centred, and never across a stage's border: a phase's first steps are not blurred into the one before.
  return values.map((value, at) => {
    if (value === null) return null;
    let sum = 0, count = 0;
    for (let k = Math.max(0, at - width); k <= Math.min(values.length - 1, at + width); k++)
      if (values[k] !== null && stages[k] === stages[at]) { sum += values[k]; count++; }
    return sum / count;
  });
}

function linePath(xs, ys) {
  let path = "", open = false;
  xs.forEach((x, at) => {
    if (ys[at] === null) { open = false; return; }
    path += (open ? "L" : "M") + x.toFixed(1) + " " + ys[at].toFixed(1);
    open = true;
  });
  return path;
}

const cursors = []; // every curve's "show this step" function: all of them follow one pointer

function lineChart(metrics, title, series, options = {}) {
  const W = 420, H = 200, L = 50, R = 8, T = 20, B = 22;
  const known = metrics.step.map((_, at) => series.some(({ name }) => metrics.series[name][at] !== null));
  const from = known.indexOf(true), to = known.lastIndexOf(true) + 1;
  const steps = metrics.step.slice(from, to), stages = metrics.stage.slice(from, to);
  const columns = series.map(({ name }) => metrics.series[name].slice(from, to));
  const values = columns.flat().filter((value) => value !== null);
  let low = Math.min(...values), high = Math.max(...values);
  if (options.zero) { low = Math.min(low, 0); high = Math.max(high, 0); }
  if (options.one) high = Math.max(high, 1);
  if (high === low) { high += Math.abs(high) * 0.1 || 1; if (!options.zero) low -= Math.abs(low) * 0.1 || 1; }
  const pad = (high - low) * 0.06;
  if (!(options.zero && low === 0)) low -= pad;
  if (!options.one || high > 1) high += pad;
  const first = steps[0] - 0.5, last = steps[steps.length - 1] + 0.5; // half a step of room, so that one step alone has a width
  const x = (step) => L + ((step - first) / (last - first)) * (W - L - R);
  const y = (value) => T + ((high - value) / (high - low)) * (H - T - B);
  const svg = s("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", tabindex: 0, "aria-label": `${title}, steps ${steps[0]} to ${steps[steps.length - 1]}` });
  for (let at = 0; at < steps.length; ) {
    let end = at;
    while (end + 1 < steps.length && stages[end + 1] === stages[at]) end++;
    // An evaluation closes its stage, so there the border is the earlier point; a logged step lies inside its own.
    const border = (next) => (options.closing ? steps[next - 1] : steps[next] - 0.5);
    const left = x(at ? border(at) : first), right = x(end + 1 < steps.length ? border(end + 1) : last);
    svg.append(s("rect", { class: "shade " + stageClass(stages[at]), x: left, y: T, width: right - left, height: H - T - B }));
    if (right - left > 7 * stages[at].length)
      svg.append(s("text", { class: "stage " + stageClass(stages[at]), x: (left + right) / 2, y: T - 6, "text-anchor": "middle" }, stages[at]));
    at = end + 1;
  }
  for (const tick of ticks(low, high, 4)) {
    svg.append(s("line", { class: "gridline", x1: L, x2: W - R, y1: y(tick), y2: y(tick) }));
    svg.append(s("text", { x: L - 6, y: y(tick) + 4, "text-anchor": "end" }, tick === 0 ? "0" : format(tick)));
  }
  for (const tick of ticks(first, last, 5).filter(Number.isInteger))
    svg.append(s("text", { x: x(tick), y: H - 6, "text-anchor": "middle" }, format(tick)));
  const xs = steps.map(x);
  const smooth = steps.length >= 40 ? Math.max(3, Math.round(steps.length / 40)) : 0;
  columns.forEach((column, index) => {
    const color = "c-s" + (1 + (index % 7));
    const draw = (data, extra) => svg.append(s("path", { class: `curve ${color} ${extra}`, d: linePath(xs, data.map((value) => (value === null ? null : y(value)))) }));
    draw(column, smooth ? "raw" : "");
    if (smooth) draw(runningMean(column, stages, smooth), "");
    column.forEach((value, at) => {
      const alone = value !== null && (column[at - 1] ?? null) === null && (column[at + 1] ?? null) === null;
      if (alone || (value !== null && steps.length <= 12)) svg.append(s("circle", { class: "point " + color, cx: xs[at], cy: y(value), r: 2.4 }));
    });
  });
  const line = s("line", { class: "cursor", y1: T, y2: H - B, visibility: "hidden" });
  const marks = series.map((_, index) => s("circle", { class: "mark c-s" + (1 + (index % 7)), r: 3.6, visibility: "hidden" }));
  svg.append(line, ...marks);
  const where = h("span"), cells = series.map(() => h("b"));
  const legend = h("div", { class: "legend", "aria-live": "off" }, series.map(({ label }, index) => h("span", {}, h("i", { class: "dot c-s" + (1 + (index % 7)) }), label, cells[index])), where);
  function show(step) {
    // null: back to the last value of each series
    const at = step === null ? -1 : steps.reduce((best, value, k) => (Math.abs(value - step) < Math.abs(steps[best] - step) ? k : best), 0);
    const here = at >= 0 && step >= first && step <= last;
    line.setAttribute("visibility", here ? "visible" : "hidden");
    if (here) { line.setAttribute("x1", xs[at]); line.setAttribute("x2", xs[at]); }
    columns.forEach((column, index) => {
      const value = here ? column[at] : column.filter((item) => item !== null).at(-1) ?? null;
      cells[index].textContent = format(value);
      marks[index].setAttribute("visibility", here && value !== null ? "visible" : "hidden");
      if (here && value !== null) { marks[index].setAttribute("cx", xs[at]); marks[index].setAttribute("cy", y(value)); }
    });
    where.textContent = here ? `step ${format(steps[at])}, ${stages[at]}` : "last value" + (smooth ? `; bold: mean of ${2 * smooth + 1}` : "");
    return here ? at : -1;
  }
  const showAll = (step) => cursors.forEach((cursor) => cursor(step));
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const step = first + ((((event.clientX - box.left) / box.width) * W - L) / (W - L - R)) * (last - first);
    showAll(Math.min(Math.max(step, steps[0]), steps[steps.length - 1]));
  });
  svg.addEventListener("pointerleave", () => showAll(null));
  svg.addEventListener("blur", () => showAll(null));
  let focus = steps.length - 1;
  svg.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1, Home: -steps.length, End: steps.length }[event.key];
    if (event.key === "Escape") showAll(null);
    if (move === undefined) return;
    event.preventDefault();
    focus = Math.min(Math.max(focus + move, 0), steps.length - 1);
    showAll(steps[focus]);
  });
  cursors.push(show);
  show(null);
  return h("div", { class: "card chart" }, h("div", { class: "head" }, h("h3", {}, title), options.unit && h("span", { class: "soft small" }, options.unit)), svg, legend);
}

function bucketChart(stages, uppers, chance) {
  const W = 460, L = 34, R = 6, T = 10, slot = (W - L - R) / uppers.length;
  const labels = slotLabels(uppers, slot), B = labels.some(({ turns }) => turns) ? 58 : 42, H = 288 + B;
  const y = (value) => T + (1 - value) * (H - T - B);
  const svg = s("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": "accuracy by prompt length for each stage; the same numbers stand in the table" });
  for (const tick of [0, 0.2, 0.4, 0.6, 0.8, 1]) {
    svg.append(s("line", { class: "gridline", x1: L, x2: W - R, y1: y(tick), y2: y(tick) }));
    svg.append(s("text", { x: L - 6, y: y(tick) + 4, "text-anchor": "end" }, tick.toFixed(1)));
  }
  labels.forEach(({ label, line }, at) => svg.append(s("text", { x: L + slot * (at + 0.5), y: H - B + 20 + 16 * line, "text-anchor": "middle" }, label)));
  svg.append(s("text", { x: L + (W - L - R) / 2, y: H - 4, "text-anchor": "middle" }, "prompt length in tokens"));
  if (chance !== null) svg.append(s("line", { class: "chance", x1: L, x2: W - R, y1: y(chance), y2: y(chance) }));
  stages.forEach((stage, index) => {
    const points = uppers.flatMap((upper, at) => {
      const bucket = stage.buckets.find((item) => item.upper === upper);
      if (!bucket || bucket.accuracy === null) return [];
      return [{ x: L + slot * (at + 0.5) + (index - (stages.length - 1) / 2) * Math.min(18, (slot * 0.7) / stages.length), ...bucket }];
    });
    const group = s("g", { class: stageClass(stage.name) });
    group.append(s("path", { class: "tie", d: linePath(points.map((point) => point.x), points.map((point) => y(point.accuracy))) }));
    for (const { x, accuracy, stderr, n } of points) {
      if (stderr !== null) {
        const top = y(Math.min(1, accuracy + stderr)), bottom = y(Math.max(0, accuracy - stderr));
        group.append(s("path", { class: "whisker", d: `M${x} ${top}V${bottom}M${x - 4} ${top}h8M${x - 4} ${bottom}h8` }));
      }
      group.append(s("circle", { class: "mark", cx: x, cy: y(accuracy), r: 5 },
        s("title", {}, `${stage.name}: ${accuracyText(accuracy)} ± ${accuracyText(stderr)}, n = ${format(n)}`)));
    }
    svg.append(group);
  });
  const legend = stages.map((stage) => h("span", {}, h("i", { class: "dot " + stageClass(stage.name) }), stage.name));
  if (chance !== null) legend.push(h("span", {}, "– – chance ", h("b", {}, accuracyText(chance))));
  return h("div", { class: "chart" }, svg, h("div", { class: "legend" }, legend));
}

function histogramChart(histogram) {
  const W = 460, H = 220, L = 34, R = 8, T = 18, B = 38;
  const { edges, selected, left } = histogram, totals = selected.map((count, at) => count + left[at]);
  const most = Math.max(1, ...totals), wide = (W - L - R) / totals.length, tall = (count) => (count / most) * (H - T - B);
  const svg = s("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": "histogram of mean reward" });
  for (const tick of ticks(0, most, 3).filter(Number.isInteger)) {
    svg.append(s("line", { class: "gridline", x1: L, x2: W - R, y1: H - B - tall(tick), y2: H - B - tall(tick) }));
    svg.append(s("text", { x: L - 6, y: H - B - tall(tick) + 4, "text-anchor": "end" }, format(tick)));
  }
  totals.forEach((total, at) => {
    const bar = (count, below, color) => count && svg.append(s("rect", { class: "bar " + color, x: L + wide * at + 2, width: wide - 4, y: H - B - tall(below + count), height: tall(count) },
      s("title", {}, `${format(edges[at])} to ${format(edges[at + 1])}: ${selected[at]} selected, ${left[at]} left`)));
    bar(selected[at], 0, "c-s2");
    bar(left[at], selected[at], "c-base");
    if (total) svg.append(s("text", { class: "value", x: L + wide * (at + 0.5), y: H - B - tall(total) - 4, "text-anchor": "middle" }, format(total)));
  });
  edges.forEach((edge, at) => svg.append(s("text", { x: L + wide * at, y: H - B + 15, "text-anchor": "middle" }, format(Number(edge.toPrecision(3))))));
  svg.append(s("text", { x: L + (W - L - R) / 2, y: H - 5, "text-anchor": "middle" }, "mean reward"));
  return h("div", { class: "chart" }, svg, h("div", { class: "legend" },
    h("span", {}, h("i", { class: "dot c-s2" }), "selected"), h("span", {}, h("i", { class: "dot c-base" }), "left")));
}

const partClass = (names, name) => "p-" + names.indexOf(name);

function timeBars(bars, parts, used, titles) {
  const W = 460, H = 300, L = 44, R = 8, T = 12, B = 36;
  const totals = bars.map((bar) => bar.seconds.reduce((sum, value) => sum + value, 0)), most = Math.max(...totals, 1e-9);
  const wide = (W - L - R) / bars.length, tall = (value) => (value / most) * (H - T - B);
  const svg = s("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": "seconds of each step by what they were spent on; means stand in the table" });
  for (const tick of ticks(0, most, 4)) {
    svg.append(s("line", { class: "gridline", x1: L, x2: W - R, y1: H - B - tall(tick), y2: H - B - tall(tick) }));
    svg.append(s("text", { x: L - 6, y: H - B - tall(tick) + 4, "text-anchor": "end" }, tick === 0 ? "0" : format(tick)));
  }
  bars.forEach((bar, at) => {
    let below = 0;
    bar.seconds.forEach((value, part) => {
      if (value <= 0) return;
      svg.append(s("rect", { class: "bar " + partClass(parts, parts[part]), x: (L + wide * at + wide * 0.06).toFixed(2), width: (wide * 0.88).toFixed(2), y: (H - B - tall(below + value)).toFixed(2), height: tall(value).toFixed(2) },
        s("title", {}, `step ${format(bar.step)}, ${bar.stage}: ${titles[parts[part]]} ${format(value)} s of ${format(totals[at])}`)));
      below += value;
    });
  });
  const every = Math.max(1, Math.ceil(bars.length / 8));
  bars.forEach((bar, at) => at % every === 0 && svg.append(s("text", { x: L + wide * (at + 0.5), y: H - B + 15, "text-anchor": "middle" }, format(bar.step))));
  svg.append(s("text", { x: L + (W - L - R) / 2, y: H - 4, "text-anchor": "middle" }, "step"), s("text", { x: 2, y: T - 2 }, "s"));
  return h("div", { class: "chart" }, svg, h("div", { class: "legend" }, used.map((part) => h("span", {}, h("i", { class: "dot " + partClass(parts, part) }), titles[part]))));
}

function laneChart(line, titles) {
  const lanes = ["generation", "rules", "judge", "waiting for rewards", "training", "weights to the server", "other"].filter((lane) => line.spans.some(([where]) => where === lane));
  const W = 460, L = 118, R = 10, T = 6, ROW = 34, H = T + lanes.length * ROW + 34, names = Object.keys(titles);
  const from = Math.min(...line.spans.map((span) => span[2]), 0), to = Math.max(...line.spans.map((span) => span[3]), from + 1e-9), x = (second) => L + ((second - from) / (to - from)) * (W - L - R);
  const svg = s("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `time line of step ${line.step}` });
  for (const tick of ticks(from, to, 5)) {
    svg.append(s("line", { class: "gridline", x1: x(tick), x2: x(tick), y1: T, y2: H - 32 }));
    svg.append(s("text", { x: x(tick), y: H - 18, "text-anchor": "middle" }, tick === 0 ? "0" : format(tick)));
  }
  lanes.forEach((lane, at) => svg.append(s("text", { x: L - 8, y: T + at * ROW + ROW / 2 + 4, "text-anchor": "end" }, lane)));
  for (const [lane, name, start, end] of line.spans)
    svg.append(s("rect", { class: "bar " + (names.includes(name) ? partClass(names, name) : "p-side"), x: x(start).toFixed(2), width: Math.max(0.6, x(end) - x(start)).toFixed(2), y: T + lanes.indexOf(lane) * ROW + 5, height: ROW - 10 },
      s("title", {}, `${titles[name] ?? name}: ${format(end - start)} s, from ${format(start)} to ${format(end)}`)));
  svg.append(s("text", { x: L + (W - L - R) / 2, y: H - 3, "text-anchor": "middle" }, "seconds after the step began"));
  return h("div", { class: "chart" }, svg);
}
