(() => {
  const doc = document.getElementById("document");
  const tip = document.getElementById("tip");
  const tokens = [...doc.querySelectorAll("i")];
  const ranked = tokens.map((t) => +t.dataset.s).sort((a, b) => a - b);
  const below = (score) => {
    let low = 0, high = ranked.length;
    while (low < high) { const mid = (low + high) >> 1; ranked[mid] < score ? (low = mid + 1) : (high = mid); }
    return low / Math.max(1, ranked.length - 1);
  };
  const line = (text, className) => {
    const element = document.createElement("div");
    element.textContent = text;
    if (className) element.className = className;
    return element;
  };
  const show = (token, x, y) => {
    const chunk = token.parentElement;
    const kept = chunk.classList.contains("kept");
    const head = document.createElement("b");
    head.textContent = "importance " + token.dataset.s;
    tip.replaceChildren(head,
      line("more important than " + Math.round(100 * below(+token.dataset.s)) + "% of the prompt"),
      line("token " + token.dataset.p + (kept ? ", kept" : ", skipped"), "g"));
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    tip.style.left = Math.max(8, Math.min(x + 14, innerWidth - box.width - 8)) + "px";
    tip.style.top = (y + 20 + box.height > innerHeight ? y - box.height - 12 : y + 20) + "px";
  };
  const over = (event) => {
    const token = event.target.closest && event.target.closest("#document i");
    token ? show(token, event.clientX, event.clientY) : (tip.hidden = true);
  };
  document.addEventListener("pointermove", over);
  document.addEventListener("pointerdown", over);
  addEventListener("scroll", () => (tip.hidden = true), { passive: true });

  // With "kept text only", a gap is marked where text was left out.
  let before = null;
  for (const chunk of doc.children) {
    if (chunk.classList.contains("kept") && before && before.classList.contains("dropped")) chunk.classList.add("gap");
    before = chunk;
  }
  const only = document.getElementById("only");
  const toggle = () => doc.classList.toggle("only", only.checked);
  only.addEventListener("change", toggle);
  toggle();
})();
