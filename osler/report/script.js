// Adds to the report what paper cannot: read-outs on the curves.
const readout = document.getElementById("readout");

// Numbers as in format.py, nearly: the browser rounds by significant figures.
function show(value, kind) {
  if (value === null) return "–";
  const size = Math.abs(value);
  let text;
  if (kind === "percent") text = (100 * value).toFixed(1) + "%";
  else if (kind === "bytes") text = compact(value).replace(/(?=[kMBT]?$)/, " ").replace("B", "G") + "B";
  else if (kind === "count" || size >= 1e5) text = count(value);
  else if (size > 0 && size < 1e-3) text = value.toExponential(2);
  else text = value.toLocaleString("en-US", { maximumSignificantDigits: 4 });
  return text.replace(/-/g, "\u2212");
}

function compact(value) {
  return value.toLocaleString("en-US", { notation: "compact", maximumSignificantDigits: 3 }).replace("K", "k");
}

function count(value) {
  return Math.abs(value) >= 1e5 ? compact(value) : Math.round(value).toLocaleString("en-US");
}

function nearest(xs, x) {
  let low = 0;
  let high = xs.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] < x) low = middle;
    else high = middle;
  }
  return x - xs[low] <= xs[high] - x ? low : high;
}

function addReadout(svg) {
  const chart = JSON.parse(svg.dataset.chart);
  const hair = svg.querySelector(".hair");
  const [xLow, xHigh, left, right] = chart.x;
  const [yLow, yHigh, bottom, top] = chart.y;
  const longest = chart.lines.reduce((a, b) => (b.x.length > a.x.length ? b : a));
  const dots = chart.lines.map((line) => {
    const dot = document.createElementNS(svg.namespaceURI, "circle");
    dot.setAttribute("class", "c" + line.c + " dot");
    dot.setAttribute("r", "4");
    dot.setAttribute("visibility", "hidden");
    return svg.appendChild(dot);
  });
  // The browser would show the title as a second tooltip; its words stay for screen readers.
  const title = svg.querySelector("title");
  svg.setAttribute("aria-label", title.textContent);
  title.remove();
  let at = longest.x.length - 1;

  function show_at(x) {
    at = nearest(longest.x, x);
    const step = longest.x[at];
    const px = left + ((step - xLow) / (xHigh - xLow)) * (right - left);
    hair.setAttribute("x1", px);
    hair.setAttribute("x2", px);
    hair.setAttribute("visibility", "visible");
    readout.replaceChildren();
    const head = document.createElement("p");
    head.textContent = chart.over === "tokens" ? count(step) + " tokens" : "step " + count(step);
    readout.append(head);
    chart.lines.forEach((line, i) => {
      const k = nearest(line.x, step);
      const y = line.y[k];
      const place = document.createElement("p");
      const swatch = document.createElement("i");
      const value = document.createElement("b");
      swatch.className = "c" + line.c;
      value.textContent = show(y, chart.kind);
      place.append(swatch, line.label + " ", value);
      if (line.x[k] !== step) place.append(" at " + count(line.x[k]));
      readout.append(place);
      dots[i].setAttribute("visibility", y === null ? "hidden" : "visible");
      if (y === null) return;
      const clamped = Math.min(Math.max(y, yLow), yHigh);
      dots[i].setAttribute("cx", left + ((line.x[k] - xLow) / (xHigh - xLow)) * (right - left));
      dots[i].setAttribute("cy", bottom + ((clamped - yLow) / (yHigh - yLow)) * (top - bottom));
    });
    readout.hidden = false;
    const box = svg.getBoundingClientRect();
    const scale = box.width / svg.viewBox.baseVal.width;
    const wanted = box.left + px * scale + 12;
    const flips = wanted + readout.offsetWidth > root.clientWidth - 8;
    readout.style.left = Math.max(8, flips ? wanted - readout.offsetWidth - 24 : wanted) + scrollX + "px";
    readout.style.top = box.top + scrollY + 10 + "px";
  }

  function hide() {
    readout.hidden = true;
    hair.setAttribute("visibility", "hidden");
    dots.forEach((dot) => dot.setAttribute("visibility", "hidden"));
  }

  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const px = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    show_at(xLow + ((px - left) / (right - left)) * (xHigh - xLow));
  });
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20 }[event.key];
    if (event.key === "Escape") hide();
    if (!move) return;
    event.preventDefault();
    show_at(longest.x[Math.min(Math.max(at + move, 0), longest.x.length - 1)]);
  });
}

document.querySelectorAll("svg[data-chart]").forEach(addReadout);

// Paper cannot unfold.
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((d) => (d.open = true)));
