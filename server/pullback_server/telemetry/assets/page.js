// Keeps the page's tables fresh, and draws its charts from /status.json. Everything that comes from the server and is
// not the server's own HTML goes in as text, never as markup.
"use strict";
(() => {
  const EVERY = 2000, SPAN = 600, LEFT = 50, RIGHT = 8, TOP = 8, BOTTOM = 18;
  const points = [];

  const digits = x => Math.abs(x) >= 99.95 ? Math.round(x).toLocaleString("en") : Math.abs(x) >= 9.995 ? x.toFixed(1) : x.toFixed(2);
  // For axes: as short as it can be said.
  const plain = text => text.replace(/(\.\d*?)0+(?=\D|$)/, "$1").replace(/\.(?=\D|$)/, "");
  const count = x => Number.isInteger(x) ? x.toLocaleString("en") : digits(x);
  const rate = x => x === 0 ? "0/s" : x < 0.1 ? digits(x * 60) + "/min" : digits(x) + "/s";
  const seconds = s => s === 0 ? "0 s" : s < 1e-3 ? digits(s * 1e6) + " µs" : s < 1 ? digits(s * 1e3) + " ms" : s < 60 ? digits(s) + " s" : digits(s / 60) + " min";
  const size = b => {
    const units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let index = 0;
    while (b >= 1024 && index < 4) { b /= 1024; index++; }
    return (index ? digits(b) : Math.round(b)) + " " + units[index];
  };
  const norm = x => x === 0 ? "0" : x >= 1e-3 && x < 1e4 ? String(Number(x.toPrecision(2))) : x.toExponential(1).replace(".0", "").replace("+", "");
  const clock = t => new Date(t * 1000).toLocaleTimeString("en-GB", {hour: "2-digit", minute: "2-digit"});

  // Names of a record in the points that are shown, those with the largest sums first; the rest in one if they add up.
  const named = (field, most, rest) => shown => {
    const sums = new Map();
    for (const p of shown) for (const [name, x] of Object.entries(p[field])) sums.set(name, (sums.get(name) || 0) + x);
    const names = [...sums.keys()].filter(name => sums.get(name) > 0).sort((a, b) => sums.get(b) - sums.get(a));
    const first = rest && names.length > most ? names.slice(0, most - 1) : names.slice(0, most);
    const found = first.map(name => ({name, of: p => p[field][name] ?? null}));
    if (rest && names.length > first.length) {
      const others = names.slice(first.length);
      found.push({name: "others", of: p => others.reduce((sum, name) => sum + (p[field][name] || 0), 0)});
    }
    return found;
  };
  const some = (...pairs) => () => pairs.map(([name, of]) => ({name, of}));
  const charts = {
    calls: {show: rate, series: named("calls", 5, true)},
    latency: {show: seconds, log: true, series: some(["50 %", p => p.p50], ["95 %", p => p.p95], ["99 %", p => p.p99])},
    queue: {show: count, whole: true, series: some(["in flight", p => p.gauges.in_flight], ["waiting", p => p.gauges.queued])},
    age: {show: seconds, area: true, series: some(["longest wait", p => p.gauges.oldest_seconds])},
    norms: {show: norm, log: true, series: named("gradient_norms", 6, false)},
    errors: {show: rate, area: true, series: some(["errors", p => p.errors])},
    sessions: {show: count, whole: true, area: true, series: some(["open", p => p.gauges.sessions])},
    bytes: {show: size, binary: true, series: some(["calls", p => p.gauges.bytes_in_flight], ["sessions", p => p.gauges.retained_bytes])},
  };

  const draw = (parent, tag, attributes, text) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text !== undefined) made.textContent = text;
    parent.append(made);
    return made;
  };

  // Values at which an axis has lines, and the axis' ends.
  const axis = (chart, values) => {
    if (chart.log) {
      const good = values.filter(x => x > 0);
      let low = good.length ? Math.floor(Math.log10(Math.min(...good))) : 0, high = good.length ? Math.ceil(Math.log10(Math.max(...good))) : 1;
      if (high - low < 1) high = low + 1;
      const step = Math.ceil((high - low) / 4), ticks = [];
      for (let e = low; e <= high; e += step) ticks.push(10 ** e);
      return {low: 10 ** low, high: 10 ** high, ticks};
    }
    const most = Math.max(...values, chart.whole ? 3 : chart.binary ? 1024 : chart.show === rate ? 1 : 1e-3);
    const base = chart.binary ? 2 ** Math.floor(Math.log2(most / 3)) : 10 ** Math.floor(Math.log10(most / 3));
    let step = (chart.binary ? [1, 2, 4] : [1, 2, 5, 10]).map(x => x * base).find(x => most <= 4 * x);
    if (chart.whole) step = Math.max(1, Math.round(step));
    const ticks = [];
    for (let i = 0; i === 0 || ticks[i - 1] < most; i++) ticks.push(i * step);
    return {low: 0, high: ticks[ticks.length - 1], ticks};
  };

  class Chart {
    constructor(figure) {
      this.chart = charts[figure.dataset.chart];
      this.title = figure.querySelector("b").textContent;
      this.svg = figure.querySelector("svg");
      this.legend = figure.querySelector("ul");
      this.at = null;
      const moved = event => {
        const box = this.svg.getBoundingClientRect();
        this.point(this.shown.findLastIndex(p => this.x(p.time) <= event.clientX - box.left + 2));
      };
      this.svg.addEventListener("pointermove", moved);
      this.svg.addEventListener("pointerleave", () => this.point(-1));
      this.svg.addEventListener("blur", () => this.point(-1));
      this.svg.addEventListener("keydown", event => {
        const by = {ArrowLeft: -1, ArrowRight: 1, PageUp: -15, PageDown: 15}[event.key];
        if (!by || !this.shown.length) return;
        event.preventDefault();
        const last = this.shown.length - 1, from = this.at === null ? last : this.shown.findIndex(p => p.time === this.at);
        this.point(Math.min(last, Math.max(0, (from < 0 ? last : from) + by)));
      });
    }

    point(index) {
      this.at = index < 0 ? null : this.shown[index].time;
      this.paint();
    }

    paint() {
      const width = this.svg.clientWidth || 300, height = this.svg.clientHeight || 132;
      const end = points.length ? points[points.length - 1].time : Date.now() / 1000;
      const span = Math.min(SPAN, Math.max(60, points.length ? end - points[0].time : 0));
      this.shown = points.filter(p => p.time >= end - span - 1);
      this.x = t => LEFT + (width - LEFT - RIGHT) * (t - end + span) / span;
      const series = this.chart.series(this.shown);
      const values = series.flatMap(one => this.shown.map(one.of)).filter(x => x !== null);
      const {low, high, ticks} = axis(this.chart, values);
      const share = this.chart.log ? x => x > low ? Math.log(x / low) / Math.log(high / low) : 0 : x => x / high;
      const y = x => height - BOTTOM - (height - TOP - BOTTOM) * share(x);
      this.svg.replaceChildren();
      for (const tick of values.length ? ticks : []) {
        draw(this.svg, "line", {class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(tick), y2: y(tick)});
        draw(this.svg, "text", {x: LEFT - 6, y: y(tick) + 4, "text-anchor": "end"}, plain(this.chart.show(tick)));
      }
      // As many times as there is room for.
      const every = [10, 30, 60, 120, 300].find(step => step * (width - LEFT - RIGHT) / span >= (step < 60 ? 72 : 48)) || SPAN;
      for (let t = Math.ceil((end - span) / every) * every; t <= end; t += every) {
        const label = every < 60 ? new Date(t * 1000).toLocaleTimeString("en-GB") : clock(t);
        if (this.x(t) < LEFT + 14 || this.x(t) > width - (every < 60 ? 26 : 18)) continue;
        draw(this.svg, "text", {x: this.x(t), y: height - 4, "text-anchor": "middle"}, label);
      }
      if (!values.length)
        draw(this.svg, "text", {x: (LEFT + width - RIGHT) / 2, y: (height - BOTTOM + TOP) / 2 + 4, "text-anchor": "middle"}, "nothing yet");
      series.forEach((one, index) => this.line(one, index, y, y(this.chart.log ? low : 0)));
      const at = this.at === null ? this.shown[this.shown.length - 1] : this.shown.find(p => p.time === this.at);
      if (this.at !== null && at) draw(this.svg, "line", {class: "cross", x1: this.x(at.time), x2: this.x(at.time), y1: TOP, y2: height - BOTTOM});
      this.tell(series, at);
    }

    line(one, index, y, floor) {
      let path = "", open = false, first = 0, last = 0;
      for (const p of this.shown) {
        const value = one.of(p);
        if (value === null) { open = false; continue; }
        last = this.x(p.time);
        if (!path) first = last;
        path += (open ? "L" : "M") + last.toFixed(1) + " " + y(value).toFixed(1);
        // A point between two gaps is seen as well.
        if (!open) path += "h.1";
        open = true;
      }
      if (!path) return;
      if (this.chart.area) draw(this.svg, "path", {class: "fill s" + index, d: path.replace(/h\.1/g, "") + `L${last} ${floor}L${first} ${floor}Z`});
      draw(this.svg, "path", {class: "line s" + index, d: path});
    }

    tell(series, at) {
      const told = [];
      this.legend.replaceChildren(...series.map((one, index) => {
        const item = document.createElement("li"), name = document.createElement("span"), value = document.createElement("b");
        draw(draw(item, "svg", {viewBox: "0 0 16 8", "aria-hidden": "true"}), "path", {class: "line s" + index, d: "M0 4h16"});
        const found = at ? one.of(at) : null;
        name.textContent = one.name === "session ops" ? "sessions" : one.name.replace(/^Compute/, "");
        name.title = one.name;
        value.textContent = found === null ? "–" : this.chart.show(found);
        told.push(one.name + " " + value.textContent);
        item.append(name, value);
        return item;
      }));
      const when = this.at === null ? "now" : at ? new Date(at.time * 1000).toLocaleTimeString("en-GB") : "";
      this.svg.setAttribute("aria-label", `${this.title}, ${when}: ${told.join(", ") || "no data yet"}`);
    }
  }

  // Puts the server's new HTML in place; where only texts differ, so that nothing loses its focus or its place.
  const refresh = (old, made) => {
    if (old.innerHTML === made.innerHTML) return;
    const [before, after] = [old, made].map(one => [...one.querySelectorAll("th, td, dd, p, caption")]);
    if (before.length !== after.length || before.some((cell, i) => cell.tagName !== after[i].tagName)) {
      old.replaceChildren(...made.childNodes);
      return;
    }
    before.forEach((cell, i) => { if (cell.innerHTML !== after[i].innerHTML) cell.replaceChildren(...after[i].childNodes); });
  };

  const get = async path => {
    const answer = await fetch(path, {signal: AbortSignal.timeout(8000)});
    if (!answer.ok) throw new Error(`the server answers ${answer.status}`);
    return answer;
  };

  const section = document.getElementById("charts"), stale = document.getElementById("stale");
  section.hidden = false;
  const drawn = [...section.querySelectorAll("figure")].map(figure => new Chart(figure));
  const paint = () => drawn.forEach(chart => chart.paint());
  let since = 0, last = Date.now();
  const look = async () => {
    try {
      const found = await (await get("/status.json?since=" + since)).json();
      // A server that was started anew has a past of its own.
      points.push(...found.points.filter(p => p.time > since));
      if (points.length) since = points[points.length - 1].time;
      while (points.length && points[0].time < since - SPAN) points.shift();
      const made = new DOMParser().parseFromString(await (await get("/tables")).text(), "text/html");
      for (const id of ["live", "tables"]) refresh(document.getElementById(id), made.getElementById(id));
      paint();
      last = Date.now();
      stale.textContent = "";
      document.title = "Pullback – " + found.now.server.state;
    } catch (error) {
      stale.textContent = `Not up to date since ${new Date(last).toLocaleTimeString("en-GB")}: ${error.message}`;
    }
    setTimeout(look, document.hidden ? 5 * EVERY : EVERY);
  };
  addEventListener("resize", paint);
  look();
})();
