"use strict";
// Rollouts token by token. All text goes through textContent.

const NATS = 100; // log-probs come in hundredths of a nat
const SCALES = [0.25, 0.5, 1, 2, 4, 8];
const USUAL_SCALE = 2; // a factor of 7 between teacher and student
const AT_ONCE = 20;

function advantage(rollout, t) {
  if (!rollout.T || !rollout.S) return null;
  const teacher = rollout.T[t] === null ? -Infinity : rollout.T[t] / NATS;
  const student = rollout.S[t] === null ? -Infinity : rollout.S[t] / NATS;
  return Number.isNaN(teacher - student) ? null : teacher - student;
}

// What a token is coloured by: the advantage, or one of the signals that the run's rollouts have.
function valueOf(rollout, t, signal) {
  return signal === "" ? advantage(rollout, t) : rollout.X[signal][t];
}

function signed(value) {
  if (!Number.isFinite(value)) return value > 0 ? "+∞" : "−∞";
  return (value < 0 ? "−" : "+") + Math.abs(value).toFixed(2);
}

function probability(hundredths) {
  if (hundredths === null) return "0";
  const p = Math.exp(hundredths / NATS);
  return p >= 0.001 ? p.toFixed(3) : p.toExponential(1);
}

// Lowest first; what has no mean advantage comes last.
const SORTS = {
  newest: (a, b) => b.step - a.step,
  oldest: (a, b) => a.step - b.step,
  longest: (a, b) => b.n - a.n,
  shortest: (a, b) => a.n - b.n,
  "lowest A": (a, b) => (meanAdvantage(a) ?? Infinity) - (meanAdvantage(b) ?? Infinity),
  "highest A": (a, b) => (meanAdvantage(b) ?? -Infinity) - (meanAdvantage(a) ?? -Infinity),
};
const CUT_BY = { length: "length budget", repetition: "repeats itself", horizon: "horizon" };
const FILTERS = ["step", "src", "cut", "rep", "ok"];
const LINKED = "rollouts?"; // begins the fragments that say what one looks at

function meanAdvantage(rollout) {
  const known = rollout.ids.map((_, t) => advantage(rollout, t)).filter((a) => a !== null && Number.isFinite(a));
  return known.length ? known.reduce((a, b) => a + b, 0) / known.length : null;
}

function startViewer(data) {
  const picks = Object.fromEntries(["arm", "seed", "sort", ...FILTERS].map((name) => [name, byId(`pick-${name}`)]));
  const search = byId("search");
  let only = null; // [what it is of a rollout, its value]: one rollout, or one prompt
  let scale = USUAL_SCALE;
  let signal = ""; // index of one of the run's, or the advantage
  let run, matching, shown, pointed;

  function fill(select, values) {
    const before = select.value;
    select.replaceChildren();
    for (const [value, text] of [["", "all"], ...values]) {
      const option = make("option", "", text);
      option.value = value;
      select.append(option);
    }
    if (values.some(([value]) => String(value) === before)) select.value = before;
  }

  function offer(select, values) {
    select.replaceChildren(...values.map(([value, text]) => {
      const option = make("option", "", text);
      option.value = value;
      return option;
    }));
  }

  // The same seed of another arm, where it has that.
  function pickArm() {
    const before = run?.name;
    const own = [...data.runs.entries()].filter(([, each]) => each.arm === Number(picks.arm.value));
    offer(picks.seed, own.map(([index, each]) => [index, each.name.replace(/^seed /, "")]));
    const same = own.find(([, each]) => each.name === before) || own.find(([, each]) => each.rollouts.length) || own[0];
    picks.seed.value = same[0];
    pickRun();
  }

  function pickRun() {
    run = data.runs[Number(picks.seed.value)];
    only = null;
    fill(picks.step, [...new Set(run.rollouts.map((r) => r.step))].sort((a, b) => b - a).map((step) => [step, step]));
    fill(picks.src, [...new Set(run.rollouts.map((r) => r.src))].sort().map((source) => [source, source]));
    filter();
  }

  function filter() {
    hideTip();
    byId("scale-low").textContent = `−${scale}`;
    const wanted = FILTERS.filter((name) => picks[name].value !== "");
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    matching = run.rollouts.filter((rollout) =>
      wanted.every((name) => String(rollout[name]) === picks[name].value)
      && (!only || rollout[only[0]] === only[1])
      && (!words.length || words.every((word) => textOf(rollout).includes(word))));
    matching.sort(only?.[0] === "of" ? SORTS.oldest : SORTS[picks.sort.value]); // equal ones stay in their order
    const note = run.note ? ` (${run.note})` : "";
    byId("viewer-count").textContent = run.rollouts.length
      ? `${matching.length} of ${run.rollouts.length} rollouts${note}.` : `Nothing to show: ${run.note || "no rollouts"}.`;
    byId("only").hidden = !only;
    byId("only").textContent = `✕ ${only?.[0] === "id" ? "this rollout" : "this prompt over steps"}: show all again`;
    byId("list").replaceChildren();
    shown = 0;
    showMore();
  }

  // What can be searched, in small letters; made when it is first asked for.
  function textOf(rollout) {
    rollout.text ??= [rollout.id, rollout.of, rollout.prompt, rollout.answer, rollout.ids.map((id) => run.vocab[id]).join("")]
      .join("\n").toLowerCase();
    return rollout.text;
  }

  // What is looked at, as the fragment of the address: a link to it.
  function link(of = only) {
    const parts = new URLSearchParams();
    parts.set("arm", data.arms[run.arm]);
    parts.set("run", run.name);
    for (const name of ["sort", ...FILTERS]) if (picks[name].value !== "") parts.set(name, picks[name].value);
    if (search.value) parts.set("search", search.value);
    if (of) parts.set(...of);
    return `#${LINKED}${parts}`;
  }

  function changed() {
    filter();
    history.replaceState(null, "", link());
  }

  function chose(what) {
    if (what) for (const name of FILTERS) picks[name].value = ""; // or less would be shown than was counted
    only = what;
    changed();
    byId("rollouts").scrollIntoView();
  }

  // Shows what a link says; parts of it that this report does not have are passed over.
  function follow() {
    const fragment = location.hash.slice(1);
    if (!fragment.startsWith(LINKED)) return;
    const parts = new URLSearchParams(fragment.slice(LINKED.length));
    const at = data.runs.findIndex((each) => data.arms[each.arm] === parts.get("arm") && each.name === parts.get("run"));
    if (at >= 0) {
      run = data.runs[at];
      picks.arm.value = run.arm;
      pickArm();
    }
    for (const name of ["sort", ...FILTERS]) {
      const value = parts.get(name) ?? (name === "sort" ? "newest" : "");
      if ([...picks[name].options].some((option) => option.value === value)) picks[name].value = value;
    }
    search.value = parts.get("search") ?? "";
    only = ["id", "of"].filter((name) => parts.has(name)).map((name) => [name, parts.get(name)])[0] ?? null;
    filter();
    byId("rollouts").scrollIntoView();
  }

  function showMore() {
    const next = matching.slice(shown, shown + AT_ONCE);
    byId("list").append(...next.map((rollout) => card(rollout)));
    shown += next.length;
    const left = matching.length - shown;
    byId("more").hidden = left === 0;
    byId("more").textContent = `Show ${Math.min(left, AT_ONCE)} more of ${left}`;
  }

  function card(rollout) {
    const article = make("article", "rollout");
    article.rollout = rollout;
    const header = make("header");
    header.append(make("b", "", `step ${rollout.step}`), make("span", "", rollout.src));
    header.append(make("span", rollout.ok ? "" : "bad", ["wrong", "right", "not judged"][rollout.ok]));
    if (rollout.cut) header.append(make("span", "bad", rollout.cut === 2 ? "cut off" : "truncated"));
    if (rollout.rep) header.append(make("span", "bad", "repetitive"));
    header.append(make("span", "", `${rollout.n} tokens`));
    const mean = meanAdvantage(rollout);
    if (mean !== null) header.append(make("span", "", `mean A ${signed(mean)}`));
    if (rollout.v) header.append(make("span", "", `weights ${rollout.v[0] === rollout.v[1] ? rollout.v[0] : rollout.v.join("–")}`));
    if (!rollout.T) header.append(make("span", "", "not scored by the teacher"));
    const steps = new Set(run.rollouts.filter((each) => each.of === rollout.of && each.src === "student").map((each) => each.step));
    if (steps.size > 1 && rollout.src === "student" && !only) {
      const button = make("button", "quiet", `this prompt at ${steps.size} steps`);
      button.type = "button";
      button.addEventListener("click", () => chose(["of", rollout.of]));
      header.append(button);
    }
    const anchor = make("a", "quiet", "link");
    anchor.href = link(["id", rollout.id]);
    header.append(anchor);
    article.append(header, make("div", "prompt", rollout.prompt));
    if (rollout.answer) {
      const expected = make("div", "expected", "expected ");
      expected.append(make("b", "", rollout.answer));
      article.append(expected);
    }
    article.append(tokens(rollout));
    return article;
  }

  function tokens(rollout) {
    const strip = make("div", "tokens");
    strip.tabIndex = 0;
    strip.setAttribute("role", "group");
    strip.setAttribute("aria-label", `Response of ${rollout.n} tokens; the arrow keys go through them`);
    const [head, left] = rollout.gap;
    rollout.ids.forEach((id, t) => {
      if (left && t === head) strip.append(make("span", "gap", `… ${left.toLocaleString("en")} tokens left out …`));
      const token = make("span", "t", visible(run.vocab[id]));
      token.t = t;
      const a = valueOf(rollout, t, signal);
      if (a !== null) {
        token.style.setProperty("--tint", a < 0 ? "var(--minus)" : "var(--plus)");
        token.style.setProperty("--much", `${Math.round(90 * Math.min(1, Math.abs(a) / scale))}%`);
      }
      strip.append(token);
    });
    if (rollout.cut) strip.append(make("span", "end", `✂ ${CUT_BY[rollout.end]}`));
    return strip;
  }

  function visible(text) {
    return text === "" ? "∅" : text.replaceAll("\n", "↵\n").replaceAll("\t", "⇥\t");
  }

  function showTip(token) {
    const rollout = token.closest("article").rollout;
    const t = token.t;
    const [head, left] = rollout.gap;
    const tip = byId("tip");
    tip.replaceChildren(make("b", "", JSON.stringify(run.vocab[rollout.ids[t]])), ` token ${t + 1 + (t >= head ? left : 0)} of ${rollout.n}`);
    const a = advantage(rollout, t);
    const table = make("table");
    const rows = [["teacher π_T", rollout.T && probability(rollout.T[t])], ["student π_θ", rollout.S && probability(rollout.S[t])],
      ["reference π_ref", rollout.R && probability(rollout.R[t])], ["advantage A", a === null ? null : `${signed(a)} nats`]];
    for (const [name, value] of rows) {
      if (value === null || value === undefined) continue;
      const row = table.insertRow();
      row.insertCell().textContent = name;
      row.insertCell().textContent = value;
    }
    run.signals.forEach((name, index) => {
      const row = table.insertRow();
      row.insertCell().textContent = name;
      row.insertCell().textContent = rollout.X[index][t] === null ? "–" : signed(rollout.X[index][t]);
    });
    for (const [id, logprob] of rollout.alt[t] ?? []) {
      const row = table.insertRow();
      row.className = "rather";
      row.insertCell().textContent = `teacher: ${JSON.stringify(run.vocab[id])}`;
      row.insertCell().textContent = probability(logprob);
    }
    tip.append(table);
    tip.hidden = false;
    const box = token.getBoundingClientRect();
    const above = box.top > tip.offsetHeight + 60;
    pointed = { token, top: box.top };
    tip.style.left = `${Math.max(8, Math.min(box.left, innerWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${above ? box.top - tip.offsetHeight - 6 : box.bottom + 6}px`;
  }

  function hideTip() {
    byId("tip").hidden = true;
    for (const token of document.querySelectorAll(".t.at")) token.classList.remove("at");
  }

  function go(strip, key) {
    const all = [...strip.querySelectorAll(".t")];
    if (!all.length) return false;
    const now = all.findIndex((token) => token.classList.contains("at"));
    const next = { ArrowRight: now + 1, ArrowLeft: now < 0 ? 0 : now - 1, Home: 0, End: all.length - 1 }[key];
    if (next === undefined) return false;
    hideTip();
    const token = all[Math.max(0, Math.min(next, all.length - 1))];
    token.classList.add("at");
    token.scrollIntoView({ block: "nearest" });
    showTip(token);
    return true;
  }

  for (const size of SCALES) {
    const option = make("option", "", `+${size} nats`);
    option.value = size;
    option.selected = size === scale;
    byId("pick-scale").append(option);
  }
  byId("pick-scale").addEventListener("change", (event) => {
    scale = Number(event.target.value);
    filter();
  });
  const pickSignal = byId("pick-signal");
  if (pickSignal) {
    offer(pickSignal, [["", "advantage A"], ...data.runs[0].signals.map((name, index) => [index, name])]);
    pickSignal.addEventListener("change", () => {
      signal = pickSignal.value;
      filter();
    });
  }
  offer(picks.arm, data.arms.map((title, arm) => [arm, title]));
  picks.arm.value = (data.runs.find((each) => each.rollouts.length) || data.runs[0]).arm;
  offer(picks.sort, Object.keys(SORTS).map((name) => [name, name]));
  picks.arm.addEventListener("change", () => {
    pickArm();
    changed();
  });
  picks.seed.addEventListener("change", () => {
    pickRun();
    changed();
  });
  for (const name of ["sort", ...FILTERS]) picks[name].addEventListener("change", changed);
  search.addEventListener("input", changed);
  byId("only").addEventListener("click", () => chose(null));
  addEventListener("hashchange", follow);
  byId("more").addEventListener("click", showMore);
  const list = byId("list");
  list.addEventListener("pointermove", (event) => {
    const again = pointed?.token === event.target && !byId("tip").hidden;
    if (!event.target.matches(".t")) hideTip();
    else if (!again) showTip(event.target);
  });
  list.addEventListener("pointerleave", hideTip);
  list.addEventListener("focusout", hideTip);
  list.addEventListener("keydown", (event) => {
    if (event.key === "Escape") hideTip();
    else if (event.target.matches(".tokens") && go(event.target, event.key)) event.preventDefault();
  });
  const scrolledAway = () => pointed && Math.abs(pointed.token.getBoundingClientRect().top - pointed.top) > 2;
  addEventListener("scroll", () => scrolledAway() && hideTip(), { passive: true });
  pickArm();
  follow();
}
