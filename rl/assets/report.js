// The page, section by section, from the JSON embedded in it.

const data = JSON.parse(document.getElementById("data").textContent);
const { metrics, accuracy, pools, agreement, behaviours, time, samples, recipe, status } = data;
const main = document.getElementById("main"), nav = document.getElementById("nav");

function section(id, short, title, lead, ...content) {
  nav.append(h("a", { href: "#" + id }, short));
  main.append(h("section", { id }, h("h2", {}, title), h("p", { class: "lead" }, lead), ...content));
}
const table = (head, rows, caption) => h("table", {}, caption && h("caption", {}, caption), h("thead", {}, h("tr", {}, head)), h("tbody", {}, rows));
const stageName = (name) => h("span", {}, h("i", { class: "dot " + stageClass(name) }), name);
const measured = (value, stderr) => [accuracyText(value), value !== null && h("span", { class: "pm" }, stderr === null ? "n < 2" : "± " + accuracyText(stderr))];
const uppersOf = (stages) => {
  const found = [...new Set(stages.flatMap((stage) => stage.buckets.map((bucket) => bucket.upper)))];
  return [...found.filter((upper) => upper !== null).sort((a, b) => a - b), ...(found.includes(null) ? [null] : [])];
};

function duration(seconds) {
  if (seconds < 60) return seconds.toFixed(1) + " s";
  const minutes = Math.round(seconds / 60);
  return minutes < 60 ? `${Math.floor(seconds / 60)} min ${Math.floor(seconds % 60)} s` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

function drawTop() {
  const tile = (name, value, more) => h("div", { class: "card tile" }, h("div", { class: "name" }, name), h("div", { class: "value" }, value), h("div", { class: "more" }, more));
  const counts = new Map();
  metrics.stage.forEach((stage) => counts.set(stage, (counts.get(stage) ?? 0) + 1));
  const perStage = metrics.step.length < metrics.total ? [...counts.keys()].join(", ") : [...counts].map(([stage, count]) => `${stage} ${format(count)}`).join(" · ");
  const tiles = [tile("Status", status.finished ? "finished" : "unfinished",
    status.finished ? `last step logged ${status.logged}` : (status.waiting.length ? "still to be evaluated: " + status.waiting.join(", ") + "; " : "") + (status.logged ? `last step logged ${status.logged}` : "no step yet"))];
  tiles.push(tile("Steps", format(metrics.total), perStage || "none yet"));
  const stages = accuracy.stages.filter((stage) => stage.buckets.some((bucket) => bucket.accuracy !== null));
  if (stages.length) {
    const uppers = uppersOf(stages), upper = uppers.at(-1), last = stages.at(-1), before = stages.find((stage) => stage.name === "sft" && stage !== last) ?? stages[0];
    const at = (stage) => stage.buckets.find((bucket) => bucket.upper === upper)?.accuracy ?? null;
    tiles.push(tile("Accuracy, longest prompts", before === last ? accuracyText(at(last)) : `${accuracyText(at(before))} → ${accuracyText(at(last))}`,
      `${before === last ? last.name : before.name + " → " + last.name}, ${tokensText(upper, uppers.at(-2) ?? 0)} tokens` + (accuracy.chance === null ? "" : `, chance ${accuracyText(accuracy.chance)}`)));
  }
  if (metrics.seconds > 0) tiles.push(tile("Time in training steps", duration(metrics.seconds), "sum of timing_s/step"));
  document.title = `${recipe.name} · ${data.run} · Longreach run`;
  document.getElementById("top").append(h("p", { class: "soft small" }, "Longreach run"), h("h1", {}, recipe.name), h("p", { class: "soft" }, "run folder ", data.run),
    h("div", { class: "tiles" }, tiles));
  if (data.notes.length) document.getElementById("top").append(h("div", { class: "notes" }, h("strong", {}, "About this data"), h("ul", {}, data.notes.map((note) => h("li", {}, note)))));
}

function bucketTable(stages, uppers, headline) {
  const sizes = (upper) => {
    const found = [...new Set(stages.flatMap((stage) => stage.buckets.filter((bucket) => bucket.upper === upper).map((bucket) => bucket.n)))].sort((a, b) => a - b);
    return found.length > 1 ? `${format(found[0])}–${format(found.at(-1))}` : format(found[0] ?? null);
  };
  const most = (upper) => Math.max(...stages.flatMap((stage) => stage.buckets.filter((bucket) => bucket.upper === upper).map((bucket) => bucket.n)));
  const head = [h("th", { scope: "col" }, "stage"), ...uppers.map((upper, at) => h("th", { scope: "col" }, tokensText(upper, at ? uppers[at - 1] : 0), h("span", { class: "pm" }, "n = " + sizes(upper))))];
  const rows = stages.map((stage) => h("tr", {}, h("th", { scope: "row" }, stageName(stage.name)), uppers.map((upper) => {
    const bucket = stage.buckets.find((item) => item.upper === upper) ?? { accuracy: null, stderr: null };
    return h("td", {}, measured(bucket.accuracy, bucket.stderr));
  })));
  const differences = headline ? accuracy.differences : [];
  if (differences.length)
    rows.push(h("tr", { class: "strong" }, h("th", { scope: "row" }, `${differences[0].after} − ${differences[0].before}`, h("span", { class: "pm wrap" }, "paired by question")), uppers.map((upper) => {
      const row = differences.find((item) => item.upper === upper) ?? { mean: null };
      return h("td", {}, row.mean === null ? "–" : [(row.mean >= 0 ? "+" : "−") + accuracyText(Math.abs(row.mean)), h("span", { class: "pm" }, row.stderr === null ? "n < 2" : "± " + accuracyText(row.stderr)), row.n !== most(upper) && h("span", { class: "pm" }, "n = " + format(row.n))]);
    })));
  if (headline && accuracy.chance !== null) rows.push(h("tr", { class: "aside" }, h("th", { scope: "row" }, "chance"), uppers.map(() => h("td", {}, accuracyText(accuracy.chance)))));
  return h("div", { class: "scroll" }, table(head, rows, "Accuracy by prompt length in tokens, ± one standard error (by question)"));
}

function drawAccuracy() {
  if (!accuracy.stages.length) return section("accuracy", "Accuracy", "Accuracy", "No evaluation has been written yet.");
  const benchmarks = [...new Set(accuracy.stages.flatMap((stage) => stage.benchmarks.map((benchmark) => benchmark.name)))];
  const headline = [...new Set(accuracy.stages.flatMap((stage) => stage.benchmarks.filter((benchmark) => benchmark.headline).map((benchmark) => benchmark.name)))];
  const choice = h("select", { on: { change: redraw } }, h("option", { value: "" }, "headline" + (headline.length ? ": " + headline.join(", ") : "")), benchmarks.map((name, at) => h("option", { value: at + 1 }, name)));
  const chart = h("div", { class: "card" }), numbers = h("div", { class: "card" });
  function redraw() {
    const name = choice.value ? benchmarks[Number(choice.value) - 1] : null;
    const stages = name === null ? accuracy.stages : accuracy.stages.map((stage) => ({ name: stage.name, buckets: stage.benchmarks.find((item) => item.name === name)?.buckets ?? [] }));
    const uppers = uppersOf(stages);
    if (!uppers.length) { chart.replaceChildren("No length bucket has been measured."); numbers.replaceChildren(); numbers.hidden = true; return; }
    numbers.hidden = false;
    chart.replaceChildren(bucketChart(stages.filter((stage) => stage.buckets.length), uppers, name === null ? accuracy.chance : null));
    numbers.replaceChildren(bucketTable(stages, uppers, name === null));
  }
  const samplesEach = [...new Set(accuracy.stages.map((stage) => stage.k).filter((k) => k !== null))].join(" or ");
  section("accuracy", "Accuracy", "Accuracy by prompt length", "Held-out questions" + (samplesEach ? `, ${samplesEach} sample(s) each` : "") + ". The headline counts " + (headline.length && headline.length < benchmarks.length ? `${headline.join(", ")} alone; the rest stands below.` : "every benchmark."),
    benchmarks.length > 0 && h("div", { class: "filters single" }, h("label", {}, "Questions", choice)), h("div", { class: "two" }, chart, numbers));
  redraw();
  if (benchmarks.length) drawBenchmarks(benchmarks);
  if (benchmarks.length) drawRules(benchmarks);
}

function drawBenchmarks(benchmarks) {
  const stages = accuracy.stages.filter((stage) => stage.benchmarks.length);
  const head = [h("th", { scope: "col" }, "benchmark"), h("th", { scope: "col" }, "n"), ...stages.map((stage) => h("th", { scope: "col" }, stageName(stage.name)))];
  const rows = benchmarks.map((name) => {
    const found = stages.map((stage) => stage.benchmarks.find((item) => item.name === name));
    const n = [...new Set(found.filter(Boolean).map((item) => item.n))];
    return h("tr", {}, h("th", { scope: "row", class: "name" }, name, h("span", { class: "pm" }, found.some((item) => item?.headline) ? "in the headline" : "reported apart")), h("td", {}, n.map(format).join(" / ")),
      found.map((item) => h("td", {}, item ? [measured(item.accuracy, item.stderr), Object.entries(item.pass_at).filter(([k]) => k !== "1").map(([k, value]) => h("span", { class: "pm" }, `pass@${k} ${accuracyText(value)}`))] : "–")));
  });
  section("benchmarks", "Benchmarks", "Accuracy by benchmark", "All lengths together: mean score over samples ± standard error, and unbiased pass@k.", h("div", { class: "card scroll" }, table(head, rows)));
}

function drawRules(benchmarks) {
  const measuredBy = (stage, name) => stage.benchmarks.find((item) => item.name === name)?.rules ?? {};
  const rules = [...new Set(accuracy.stages.flatMap((stage) => benchmarks.flatMap((name) => Object.keys(measuredBy(stage, name)))))];
  if (!rules.length) return;
  const head = [h("th", { scope: "col" }, "benchmark"), h("th", { scope: "col", class: "text" }, "stage"), ...rules.map((rule) => h("th", { scope: "col" }, rule))];
  const rows = benchmarks.flatMap((name) => accuracy.stages.filter((stage) => Object.keys(measuredBy(stage, name)).length).map((stage) => h("tr", {}, h("th", { scope: "row", class: "name" }, name), h("td", { class: "text" }, stageName(stage.name)),
    rules.map((rule) => { const made = measuredBy(stage, name)[rule]; return h("td", {}, made ? measured(made.accuracy, made.stderr) : "–"); }))));
  section("rules", "Rules", "Strict and published rules side by side", "The same completions under each rule, mean ± standard error, without a judge. qwenlong-l1 is the released training reward (0 without a closed reasoning), qwenlong-l1-eval the released evaluation; longbench is F1, longbench-em equality. Where a published rule is far above the strict one, look at the completions.",
    h("div", { class: "card scroll" }, table(head, rows)));
}

const CURVES = [
  ["Reward", { unit: "mean per completion", zero: true, one: true }, [["reward", "reward"]]],
  ["Entropy", { unit: "nats per token", zero: true }, [["entropy", "entropy"]]],
  ["Completion length", { unit: "tokens", zero: true }, [["completions/mean_length", "mean"], ["completions/max_length", "max"], ["completions/min_length", "min"]]],
  ["Cut at the length limit", { unit: "share of completions", zero: true }, [["completions/clipped_ratio", "cut"]]],
  ["Clip ratio", { unit: "share of tokens", zero: true }, [["clip_ratio/low_mean", "low"], ["clip_ratio/high_mean", "high"], ["clip_ratio/region_mean", "either"]]],
  ["Groups without signal", { unit: "share of groups", zero: true, one: true }, [["frac_reward_zero_std", "share"]]],
  ["Reward spread in groups", { unit: "std", zero: true }, [["reward_std", "std"]]],
  ["KL to the reference", { unit: "nats per token", zero: true }, [["kl", "kl"]]],
  ["Throughput", { unit: "tokens/s", zero: true }, [["perf/throughput", "throughput"]]],
  ["Time per step", { unit: "s", zero: true }, [["timing_s/step", "step"], ["timing_s/gen", "generation"], ["timing_s/update_actor", "update"], ["timing_s/reward", "reward"]]],
  ["Judge", { unit: "s per step", zero: true }, [["reward/judge_time", "at work"], ["reward/judge_wait", "waited for"]]],
  ["Judge failures", { unit: "share of the last answers", zero: true, one: true }, [["judge/failure_rate", "no verdict"], ["judge/breaker", "breaker open"]]],
];
const BY_STAGE = [["Loss", {}, "loss"], ["Gradient norm", { zero: true }, "grad_norm"]];

function courseOfAccuracy() {
  // Evaluations made within a phase, with those at the stages' ends, in the form of logged metrics.
  const points = [...accuracy.stages, ...accuracy.within].filter((stage) => stage.step !== null).sort((a, b) => a.step - b.step);
  const at = (stage, upper) => stage.buckets.find((bucket) => bucket.upper === upper)?.accuracy ?? null;
  return { step: points.map((stage) => stage.step), stage: points.map((stage) => stage.name.split("-")[0]),
    series: Object.fromEntries(uppersOf(points).map((upper) => [String(upper), points.map((stage) => at(stage, upper))])) };
}

function drawCurves() {
  if (!metrics.total) return section("curves", "Curves", "Learning curves", "No step has been logged yet.");
  const used = new Set(BY_STAGE.map(([, , name]) => name)), cards = [];
  for (const [title, options, wanted] of CURVES) {
    const series = wanted.filter(([name]) => name in metrics.series).map(([name, label]) => ({ name, label }));
    series.forEach(({ name }) => used.add(name));
    if (series.length) cards.push(lineChart(metrics, title, series, options));
  }
  if (accuracy.within.length) cards.unshift(lineChart(courseOfAccuracy(), "Held-out accuracy", uppersOf(accuracy.stages.concat(accuracy.within)).map((upper, at, uppers) => ({ name: String(upper), label: tokensText(upper, uppers[at - 1] ?? 0) })), { unit: "by prompt tokens", zero: true, one: true, closing: true }));
  // A cross-entropy and a policy loss share a name and nothing else: SFT is drawn apart from RL.
  const splits = [["SFT", (stage) => stage === "sft"], ["RL", (stage) => stage !== "sft"]];
  for (const [title, options, name] of BY_STAGE)
    for (const [kind, belongs] of name in metrics.series ? splits : []) {
      const values = metrics.series[name].map((value, at) => (belongs(metrics.stage[at]) ? value : null));
      if (values.some((value) => value !== null)) cards.push(lineChart({ ...metrics, series: { [name]: values } }, `${title}, ${kind}`, [{ name, label: name }], options));
    }
  const rest = Object.keys(metrics.series).filter((name) => !used.has(name));
  const more = rest.length > 0 && h("details", { class: "fold" }, h("summary", {}, `${rest.length} more logged metric(s)`), h("div", { class: "grid" }, rest.map((name) => lineChart(metrics, name, [{ name, label: "value" }]))));
  section("curves", "Curves", "Learning curves", "One point per step, stages shaded. Point at a curve, or focus one and use the arrow keys, to read all of them at that step.", h("div", { class: "grid" }, cards), more);
}

const PARTS = { update_weights: "weights to the servers", wait_for_rollouts: "waiting for rollouts", gen: "generation", reward: "waiting for rewards", old_log_prob: "old log-probs", ref: "reference", update_actor: "update", other: "other" };

function drawTime() {
  const place = h("div"), shown = time.lines, pass = Object.entries(time.passes).map(([kind, seconds]) => `${kind} ${duration(seconds)}`).join(", ");
  const choice = h("select", { on: { change: () => place.replaceChildren(laneChart(shown[Number(choice.value)], PARTS)) } },
    shown.map((line, at) => h("option", { value: at, selected: at === shown.length - 1 }, `step ${format(line.step)}, ${line.stage}`)));
  if (shown.length) place.replaceChildren(laneChart(shown.at(-1), PARTS));
  const used = time.parts.filter((part, at) => time.bars.some((bar) => bar.seconds[at] > 0));
  const rows = time.stages.map((stage) => h("tr", {}, h("td", { class: "text" }, stageName(stage.stage)), [format(stage.steps), ...[stage.step, ...used.map((part) => stage[part]), stage.rules, stage.judge].map((seconds) => seconds.toFixed(2)), stage.judge > 0 ? (stage.hidden / stage.judge * 100).toFixed(0) + " %" : "–"].map((value) => h("td", {}, value))));
  const head = ["stage", "steps", "step", ...used.map((part) => PARTS[part]), "rules at work", "judge at work", "of it hidden"];
  section("time", "Time", "Where a step's seconds go", "From timeline.jsonl. Rules and judge work beside generation: what generation hides of them costs nothing, what is left is waited for. The longreach trace command writes the same for ui.perfetto.dev." + (pass ? ` Apart from steps: ${pass}.` : ""),
    h("div", { class: "stack" }, time.bars.length > 0 && h("div", { class: "two" }, h("div", { class: "card" }, timeBars(time.bars, time.parts, used, PARTS)),
      h("div", { class: "card" }, h("div", { class: "filters single" }, h("label", {}, "Time line of", choice)), place)),
    h("div", { class: "card scroll" }, table(head.map((title, at) => h("th", { scope: "col", class: at ? null : "text" }, title)), rows, "Mean seconds a step"))));
}

function drawPool(pool) {
  const reasons = pool.reasons.map((item) => h("tr", {}, h("td", {}, item.selected ? "selected" : "left"), h("td", { class: "why" }, item.why), h("td", {}, format(item.n))));
  const columns = ["prompt", "benchmark", "tokens", "mean reward", "difficulty", "samples", "selected", "why"];
  const rows = pool.rows.map((row) => h("tr", {}, h("td", { class: "name" }, row.prompt_id), h("td", { class: "text name" }, row.benchmark), h("td", {}, format(row.prompt_length)), h("td", {}, format(row.mean_reward)),
    h("td", {}, format(row.difficulty)), h("td", {}, format(row.samples)), h("td", {}, row.selected ? "yes" : "no"), h("td", { class: "why" }, row.why)));
  const shown = pool.rows.length < pool.total ? `${format(pool.rows.length)} of ${format(pool.total)} prompts, selected and hardest first` : "All prompts, selected and hardest first";
  return h("div", { class: "stack" }, h("div", { class: "head" }, h("h3", {}, "After ", pool.stage), h("span", { class: "soft small" }, `${format(pool.total)} prompts, ${format(pool.scored)} with a verdict, ${format(pool.selected)} selected`)),
    h("div", { class: "two" }, h("div", { class: "card" }, histogramChart(pool.histogram)),
      h("div", { class: "card scroll" }, table(["", "why", "prompts"].map((text, at) => h("th", { scope: "col", class: at === 1 ? "text" : null }, text)), reasons))),
    h("div", { class: "card tall", tabindex: 0, role: "region", "aria-label": "prompts of the pool" }, table(columns.map((text, at) => h("th", { scope: "col", class: [1, 7].includes(at) ? "text" : null }, text)), rows, shown)));
}

function drawAgreement() {
  const share = (part, whole) => (whole ? accuracyText(part / whole) : "–");
  const heads = [["stage", "text"], ["from", "text"], ["benchmark", "text"], ["both yes"], ["rule yes, judge no"], ["of the rule's yes"], ["rule no, judge yes"], ["of the rule's no"], ["both no"]];
  const rows = agreement.map((row) => h("tr", {}, h("td", { class: "text" }, stageName(row.stage)), h("td", { class: "text" }, row.kind), h("td", { class: "text name" }, row.benchmark),
    [format(row.both), format(row.rule_only), share(row.rule_only, row.both + row.rule_only), format(row.judge_only), share(row.judge_only, row.judge_only + row.neither), format(row.neither)].map((text) => h("td", {}, text))));
  section("agreement", "Agreement", "Rule and judge", "Completions that both have scored. “Rule yes, judge no” that grows over the stages is the mark of a gamed rule, “rule no, judge yes” of a rule too strict or of a judge that is talked into it. The judge sees only a share of what the rule accepts (reward.judge.audit), so compare shares, not counts; the completions in question are found below by their reasons “disputed” and “judged_correct”.",
    h("div", { class: "card scroll" }, table(heads.map(([text, kind]) => h("th", { scope: "col", class: kind ?? null }, text)), rows)));
}

function drawBehaviours() {
  const names = { grounding: "Grounding", subgoal_setting: "Subgoal setting", backtracking: "Backtracking", verification: "Verification" };
  const text = (estimate) => (estimate?.mean == null ? "–" : [estimate.mean.toFixed(2), h("span", { class: "pm" }, estimate.stderr === null ? "n < 2" : "± " + estimate.stderr.toFixed(2))]);
  const share = (value) => (value === null ? "–" : value.toFixed(2));
  const trained = behaviours.points.filter((point) => point.kind === "training"), cards = [];
  const course = (read) => ({ step: trained.map((point) => point.step), stage: trained.map((point) => point.stage), series: read });
  for (const name of trained.length ? behaviours.behaviours : []) {
    const series = { lexical: trained.map((point) => point.lexical[name].mean) };
    if (behaviours.judge) series.judge = trained.map((point) => point.judge?.[name].mean ?? null);
    const known = [["lexical", "by words"], ["judge", "by the judge"]].filter(([key]) => series[key]?.some((value) => value !== null)).map(([key, label]) => ({ name: key, label }));
    if (known.length) cards.push(lineChart(course(series), names[name], known, { unit: "instances per response", zero: true }));
  }
  if (trained.some((point) => point.score.mean !== null)) cards.push(lineChart(course({ score: trained.map((point) => point.score.mean) }), "Score of the same responses", [{ name: "score", label: "mean" }], { zero: true, one: true }));
  if (trained.length) cards.push(lineChart(course({ characters: trained.map((point) => point.characters.mean) }), "Length of the same responses", [{ name: "characters", label: "mean" }], { unit: "characters of reasoning", zero: true }));
  const counters = behaviours.judge ? ["lexical", "judge"] : ["lexical"], head = ["stage", "from", "step", "responses", "counted", ...behaviours.behaviours.map((name) => names[name]), "score"];
  const ends = [trained[0], trained.at(-1)].filter((point, at, both) => point && both.indexOf(point) === at);
  const rows = [...ends, ...behaviours.points.filter((point) => point.kind !== "training")].flatMap((point) => counters.map((counter, at) => h("tr", {}, h("td", { class: "text" }, at ? "" : stageName(point.stage)), h("td", { class: "text" }, at ? "" : point.kind),
    h("td", {}, at ? "" : format(point.step)), h("td", {}, at ? point.judge ? format(point.n - point.judge.failed) : "–" : format(point.n)), h("td", { class: "text" }, at ? "by the judge" : "by words"), behaviours.behaviours.map((name) => h("td", {}, text(point[counter]?.[name]))), h("td", {}, at ? "" : text(point.score)))));
  const pairs = behaviours.comparison ?? [], asked = behaviours.points.filter((point) => point.judge), sum = (key) => asked.reduce((total, point) => total + point.judge[key], 0);
  const compared = pairs.length > 0 && h("div", { class: "card scroll" }, table(["behaviour", "responses", "by words", "by the judge", "rank correlation", "equal counts", "steps", "rank correlation of the steps"].map((title, at) => h("th", { scope: "col", class: at ? null : "text" }, title)),
    pairs.map((pair) => h("tr", {}, h("td", { class: "text" }, names[pair.behaviour]), [format(pair.n), share(pair.lexical), share(pair.judge), share(pair.spearman), share(pair.equal), format(pair.steps), share(pair.spearman_steps)].map((value) => h("td", {}, value)))),
    `Both counters over the same responses (Spearman, ties at their mean rank). Judge ${behaviours.judge.name}: ${format(sum("failed"))} response(s) without a count, ${format(sum("invented"))} of ${format(sum("listed"))} listed instance(s) not found in the response and left out`));
  section("behaviours", "Behaviours", "Behaviours in the reasoning", `Average count per response of grounding, subgoal setting, backtracking and verification (as in QwenLong-L1's figure 7), in at most ${format(behaviours.samples)} responses a step, ± one standard error clustered by question. ` + (behaviours.judge ? "" : "Counted by words alone: give longreach behaviours a judge to set beside them. ") + "A longer response has room for more of everything, so look at the length too.",
    h("div", { class: "stack" }, h("div", { class: "grid" }, cards), h("div", { class: "card scroll" }, table(head.map((title, at) => h("th", { scope: "col", class: [0, 1, 4].includes(at) ? "text" : null }, title)), rows)), compared));
}

function rewardKind(value) {
  if (value === null) return "none";
  return value >= 1 ? "good" : value > 0 ? "mid" : "bad";
}

function completionRow(row, startsGroup) {
  const facts = [["prompt", row.prompt_id + (row.prompt_length === null ? "" : `, ${format(row.prompt_length)} tokens`)]];
  if (row.kind === "evaluation") facts.push(["question", row.question], ["answers", row.answers.join(" | ") || "–"]);
  for (const [part, value] of Object.entries(row.rewards ?? {})) facts.push(["reward " + part, value === null ? "no verdict" : format(value)]);
  if (row.reason !== null) facts.push(["reason", row.reason + (row.rule_reason && row.rule_reason !== row.reason ? ` (the rule: ${row.rule_reason})` : "")]);
  if (row.extracted) facts.push(["answer read", row.extracted]);
  if (row.cut) facts.push(["shown", `without ${format(row.cut)} characters of its middle`]);
  const details = h("details", { class: "row" + (startsGroup ? " new" : "") }, h("summary", {}, h("span", { class: "pill " + rewardKind(row.reward) }, row.reward === null ? "no verdict" : format(row.reward)), stageName(row.stage),
    h("span", {}, row.kind === "training" ? `step ${format(row.step)}` : "evaluation"), h("span", { class: "soft" }, row.benchmark), h("span", { class: "soft" }, row.prompt_id),
    row.kind === "training" && h("span", { class: "soft" }, `advantage ${format(row.advantage)}`), row.kind === "training" && h("span", { class: "soft" }, `${format(row.tokens)} tokens, ${row.finish}`),
    h("span", { class: "preview" }, row.text.slice(0, 240))));
  // The body is built when it is first opened: thousands of closed rows stay cheap.
  details.addEventListener("toggle", () => details.append(h("div", { class: "body" }, h("dl", { class: "facts" }, facts.map(([key, value]) => [h("dt", {}, key), h("dd", {}, value)])), h("pre", { tabindex: 0 }, row.text))), { once: true });
  return details;
}

function drawCompletions() {
  const all = samples.rows, PAGE = 25;
  if (!all.length) return section("completions", "Completions", "Completions", "No completion has been saved yet.");
  const distinct = (read) => [...new Set(all.map(read))].filter((value) => value !== null);
  const pick = (label, options, chosen = "") => {
    const select = h("select", { on: { change: () => redraw() } }, options.map(([value, text]) => h("option", { value, selected: value === chosen }, text)));
    return { select, node: h("label", {}, label, select) };
  };
  const list = (values) => [["", "all"], ...values.map((value) => [String(value), String(value)])];
  const kinds = distinct((row) => row.kind);
  const kind = pick("From", list(kinds), kinds[0]), stage = pick("Stage", list(distinct((row) => row.stage))), step = pick("Step", list(distinct((row) => row.step).sort((a, b) => b - a)));
  const benchmark = pick("Benchmark", list(distinct((row) => row.benchmark)));
  const reward = pick("Reward", [["", "all"], ["good", "1 or more"], ["mid", "between 0 and 1"], ["bad", "0 or less"], ["none", "no verdict"]]);
  const search = h("input", { type: "search", placeholder: "text, id, reason", on: { input: () => redraw() } });
  const rows = h("div", { class: "rows" }), told = h("p", { class: "soft small", role: "status" }), more = h("button", { class: "more", on: { click: () => page() } }, "Show more");
  let found = [], drawn = 0;
  function page() {
    rows.append(...found.slice(drawn, drawn + PAGE).map((row, at) => {
      const before = found[drawn + at - 1];
      return completionRow(row, before !== undefined && (before.prompt_id !== row.prompt_id || before.benchmark !== row.benchmark || before.step !== row.step || before.stage !== row.stage));
    }));
    drawn = Math.min(drawn + PAGE, found.length);
    more.hidden = drawn >= found.length;
    told.textContent = `${format(found.length)} match, ${format(drawn)} listed`;
  }
  function redraw() {
    const needle = search.value.trim().toLowerCase();
    const matches = (filter, value) => filter.select.value === "" || filter.select.value === String(value);
    found = all.filter((row) => matches(kind, row.kind) && matches(stage, row.stage) && matches(step, row.step) && matches(benchmark, row.benchmark) && matches(reward, rewardKind(row.reward)) &&
      (!needle || [row.text, row.prompt_id, row.reason ?? "", row.question ?? ""].some((text) => text.toLowerCase().includes(needle))));
    rows.replaceChildren();
    drawn = 0;
    page();
  }
  const share = ([shown, total], what) => total > 0 && `${format(shown)} of ${format(total)} ${what}`;
  section("completions", "Completions", "Completions", "Embedded here: " + [share(samples.training, "training completions (the last step of each stage, then whole groups of evenly spaced steps)"), share(samples.evaluation, "evaluation completions (the same questions at each stage)")].filter(Boolean).join("; ") + ". All of them are in the run folder.",
    h("div", { class: "filters" }, kind.node, stage.node, step.node, benchmark.node, reward.node, h("label", {}, "Contains", search)), told, rows, more);
  redraw();
}

drawTop();
drawAccuracy();
drawCurves();
if (time !== null) drawTime();
if (pools.length) section("pool", "Pool", "Retrospective pool", "Difficulty of each prompt after a phase (1 / mean reward; a mean below half a success counts as that half), and the hard ones carried into the next phase.", h("div", { class: "stack" }, pools.map(drawPool)));
if (agreement.length) drawAgreement();
if (behaviours !== null) drawBehaviours();
drawCompletions();
if (recipe.text !== null) section("recipe", "Recipe", "Recipe", "Resolved: every key that was used, defaults and overrides included.", h("pre", { tabindex: 0 }, recipe.text));
