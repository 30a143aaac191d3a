(() => {
  "use strict";
  const get = (id) => document.getElementById(id);
  const facts = JSON.parse(get("facts").textContent);
  const layers = facts.layers;
  const doc = get("document"), tip = get("tip"), bars = [...get("bars").children];
  const tokens = [...doc.querySelectorAll("i")];
  const count = tokens.length;
  const number = new Map(tokens.map((token, n) => [token, n]));
  const positions = tokens.map((token) => +token.dataset.p);
  const written = tokens.map((token) => token.className); // the shades over all layers
  const marks = written.map((name) => name.replace(/^h\d+/, ""));
  const comma = (value) => value.toLocaleString("en-US");
  const digits = (value, n) => (value > 0 ? String(+value.toPrecision(n)) : "0");
  get("tools").hidden = false;

  // Layers: a byte per token, its logarithm (shades.py has the same formulas).
  let chosen = -1; // all layers
  const codes = layers && Uint8Array.from(atob(layers.codes), (c) => c.charCodeAt(0));
  const decoded = layers && layers.tops.map((top) =>
    Float64Array.from({ length: 256 }, (_, code) => (code ? top * 10 ** ((-(255 - code) * layers.decades) / 254) : 0)));
  const shades = layers && decoded.map((values, row) =>
    Uint8Array.from(values, (value) => Math.min(12, Math.floor(12 * Math.sqrt(value / layers.scales[row]) + 0.5))));
  const score = (row, n) => decoded[row][codes[row * count + n]];
  const layerName = (row) => (row < 0 ? "all layers" : "layer " + layers.numbers[row]);

  const higher = []; // per layer, how many tokens have a larger byte; made when asked for
  const layerRank = (row, n) => {
    if (!higher[row]) {
      const above = new Uint32Array(257);
      for (let k = row * count; k < (row + 1) * count; k++) above[codes[k]]++;
      for (let code = 255; code >= 0; code--) above[code] += above[code + 1];
      higher[row] = above;
    }
    return 1 + higher[row][codes[row * count + n] + 1];
  };

  // The map of chunks.
  const place = new Map(bars.map((bar, n) => [+bar.dataset.c, n]));
  const chunkOf = positions.map((position) => place.get(Math.floor(position / facts.chunk)));
  const sizes = new Float64Array(bars.length);
  chunkOf.forEach((chunk) => sizes[chunk]++);
  const means = (value) => {
    const sums = new Float64Array(bars.length);
    for (let n = 0; n < count; n++) sums[chunkOf[n]] += value(n) || 0;
    return sums.map((sum, chunk) => sum / sizes[chunk]);
  };
  const allMeans = means((n) => +tokens[n].dataset.s);
  const writtenHeights = bars.map((bar) => bar.style.height);
  let shownMeans = allMeans;
  const reshade = () => {
    if (chosen < 0) {
      shownMeans = allMeans;
      tokens.forEach((token, n) => (token.className = written[n]));
      bars.forEach((bar, n) => (bar.style.height = writtenHeights[n]));
      return;
    }
    const levels = shades[chosen], start = chosen * count;
    tokens.forEach((token, n) => (token.className = "h" + levels[codes[start + n]] + marks[n]));
    shownMeans = means((n) => score(chosen, n));
    const top = [...shownMeans].sort((a, b) => a - b)[Math.floor(0.97 * (bars.length - 1))] || 1;
    bars.forEach((bar, n) => (bar.style.height = Math.max(3, 100 * Math.sqrt(Math.min(1, shownMeans[n] / top))) + "%"));
  };
  const choose = (row) => {
    chosen = row;
    const slider = get("layer"), mark = get("row");
    slider.value = row + 1;
    slider.setAttribute("aria-valuetext", layerName(row));
    get("layername").textContent = layerName(row);
    get("all").setAttribute("aria-pressed", row < 0);
    mark.hidden = row < 0;
    mark.style.top = `calc(${(100 * row) / layers.numbers.length}% - 1.5px)`;
    mark.style.height = `calc(${100 / layers.numbers.length}% + 3px)`;
    reshade();
    if (note) note();
  };
  const paint = () => {
    const canvas = get("heat"), rows = layers.numbers.length, columns = Math.max(1, Math.min(facts.tokens, 960));
    const [red, green, blue] = getComputedStyle(document.documentElement).getPropertyValue("--heat").match(/\d+/g).map(Number);
    canvas.width = columns;
    canvas.height = rows;
    canvas.style.height = rows * Math.max(3, Math.min(9, Math.round(210 / rows))) + "px";
    const image = new ImageData(columns, rows);
    const column = (position) => Math.floor((position * columns) / facts.tokens);
    for (let row = 0; row < rows; row++) {
      for (let n = 0; n < count; n++) {
        const alpha = Math.round((255 * shades[row][codes[row * count + n]]) / 12);
        const end = Math.max(column(positions[n]) + 1, column(n + 1 < count ? positions[n + 1] : facts.tokens));
        for (let x = column(positions[n]); x < end; x++) {
          const at = 4 * (row * columns + x);
          if (alpha > image.data[at + 3]) image.data.set([red, green, blue, alpha], at);
        }
      }
    }
    canvas.getContext("2d").putImageData(image, 0, 0);
  };

  // The note beside the pointer, or beside the token that has the keyboard.
  let note = null; // draws the note again
  const line = (text, className, tag = "div") => {
    const element = document.createElement(tag);
    element.textContent = text;
    if (className) element.className = className;
    return element;
  };
  const state = (token) => {
    if (!token.parentElement.classList.contains("kept")) return "skipped";
    return token.dataset.l === undefined ? "kept" : "kept: protected, " + facts.labels[token.dataset.l];
  };
  const lines = (token) => {
    const n = number.get(token);
    const all = [
      line(JSON.stringify(token.textContent), "", "code"),
      line("importance " + token.dataset.s, "", "b"),
      line(`rank ${comma(+token.dataset.r)} of ${comma(count)}`),
    ];
    if (layers) {
      const values = layers.numbers.map((_, row) => score(row, n));
      const best = values.indexOf(Math.max(...values)), lit = chosen < 0 ? best : chosen;
      const chart = line("", "bylayer");
      values.forEach((value, row) => {
        const bar = line("", row === lit ? "on" : "", "span");
        bar.style.height = Math.max(4, 100 * Math.sqrt(values[best] ? value / values[best] : 0)) + "%";
        chart.append(bar);
      });
      all.push(chart);
      if (chosen >= 0) all.push(line(`${layerName(chosen)}: ${digits(values[chosen], 2)}, rank ${comma(layerRank(chosen, n))}`));
      all.push(line(`strongest in ${layerName(best)}: ${digits(values[best], 2)}`, "g"));
    }
    all.push(line(`token ${positions[n]}, chunk ${Math.floor(positions[n] / facts.chunk)}`, "g"), line(state(token)));
    return all;
  };
  const barLines = (bar) => {
    const n = bars.indexOf(bar), start = +bar.dataset.c * facts.chunk, end = Math.min(facts.tokens, start + facts.chunk);
    const kind = bar.classList.contains("part") ? bar.style.getPropertyValue("--share") + " kept" : bar.classList.contains("kept") ? "kept" : "skipped";
    return [
      line(`chunk ${bar.dataset.c}, ${kind}`, "", "b"),
      line(`mean importance ${digits(shownMeans[n], 3)}${chosen < 0 ? "" : ", " + layerName(chosen)}`),
      line(`tokens ${start} to ${end - 1}`, "g"),
    ];
  };
  const showAt = (make, x, y, below) => {
    note = () => {
      tip.replaceChildren(...make());
      tip.hidden = false;
      const box = tip.getBoundingClientRect();
      tip.style.left = Math.max(8, Math.min(x, innerWidth - box.width - 8)) + "px";
      tip.style.top = Math.max(8, y + below + box.height > innerHeight ? y - box.height - 12 : y + below) + "px";
    };
    note();
  };
  const hide = () => { tip.hidden = true; note = null; };
  const point = (event) => {
    const at = event.target.closest ? event.target.closest("#document i, #bars a, #heat") : null;
    if (!at) return hide();
    if (at.id === "heat") return showAt(() => [line(layerName(rowAt(event)), "", "b"), line("choose it to shade the text", "g")], event.clientX + 14, event.clientY, 20);
    showAt(() => (at.tagName === "A" ? barLines(at) : lines(at)), event.clientX + 14, event.clientY, 20);
  };
  document.addEventListener("pointermove", point);
  document.addEventListener("pointerdown", point);
  addEventListener("scroll", () => {
    const token = document.activeElement;
    note && number.has(token) ? showToken(token) : hide();
  }, { passive: true });

  // The keyboard: the document is one stop, arrows go on from there.
  const showToken = (token) => {
    const box = token.getClientRects()[0] || token.getBoundingClientRect();
    showAt(() => lines(token), box.left, box.bottom, 8);
  };
  const focus = (token) => {
    token.tabIndex = -1;
    token.focus({ preventScroll: true });
    token.scrollIntoView({ block: "nearest" });
    showToken(token);
    get("say").textContent = lines(token).map((element) => element.textContent).filter(Boolean).join("; ");
  };
  const visible = (n) => tokens[n].textContent !== "" && !(only.checked && tokens[n].parentElement.classList.contains("dropped"));
  const step = (from, by) => {
    let n = from + by;
    while (n >= 0 && n < count && !visible(n)) n += by;
    if (n >= 0 && n < count) focus(tokens[n]);
  };
  let span = -1;
  const jump = (by) => {
    if (!facts.spans.length) return;
    const active = number.get(document.activeElement);
    if (active !== undefined) {
      const starts = facts.spans.map(([start]) => start), here = positions[active];
      span = starts.filter((start) => start <= here).length - 1;
      if (by < 0 && span >= 0 && starts[span] < here) span++; // first back to the start of this one
    }
    span = span < 0 && by < 0 ? facts.spans.length - 1 : (span + by + facts.spans.length) % facts.spans.length;
    const [start, end] = facts.spans[span];
    get("place").textContent = `span ${span + 1} of ${facts.spans.length}`;
    get("place").title = `tokens ${start} to ${end - 1}`;
    let n = positions.indexOf(start);
    while (n + 1 < count && tokens[n].textContent === "") n++;
    focus(tokens[n]);
  };
  doc.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const here = number.get(document.activeElement);
    const go = {
      ArrowRight: () => step(here === undefined ? -1 : here, 1),
      ArrowLeft: () => step(here === undefined ? count : here, -1),
      Home: () => step(-1, 1),
      End: () => step(count, -1),
      n: () => jump(1),
      p: () => jump(-1),
    }[event.key];
    if (!go) return;
    event.preventDefault();
    go();
  });
  document.addEventListener("keydown", (event) => event.key === "Escape" && hide());
  get("next").addEventListener("click", () => jump(1));
  get("previous").addEventListener("click", () => jump(-1));
  for (const button of document.querySelectorAll(".part")) {
    const own = tokens.filter((token) => token.dataset.l === button.dataset.label);
    const starts = own.filter((token, n) => n === 0 || number.get(own[n - 1]) + 1 !== number.get(token));
    let at = -1;
    button.disabled = !starts.length;
    button.addEventListener("click", () => focus(starts[(at = (at + 1) % starts.length)]));
  }

  const only = get("only");
  const toggle = () => { doc.classList.toggle("only", only.checked); hide(); };
  only.addEventListener("change", toggle);
  get("bars").addEventListener("click", (event) => {
    if (event.target.classList.contains("dropped") && only.checked) { only.checked = false; toggle(); }
  });
  toggle();

  const rowAt = (event) => {
    const box = get("heat").getBoundingClientRect();
    return Math.max(0, Math.min(layers.numbers.length - 1, Math.floor(((event.clientY - box.top) / box.height) * layers.numbers.length)));
  };
  if (layers) {
    get("layermap").hidden = get("layernote").hidden = false;
    get("layer").addEventListener("input", (event) => choose(event.target.value - 1));
    get("all").addEventListener("click", () => choose(-1));
    get("layermap").addEventListener("click", (event) => { const row = rowAt(event); choose(row === chosen ? -1 : row); });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
    paint();
    choose(+get("layer").value - 1); // a browser may bring a reloaded page's slider back
  }
})();
