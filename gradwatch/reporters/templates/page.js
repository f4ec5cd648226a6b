"use strict";
(() => {
  let data = JSON.parse(document.getElementById("data").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const LIGHT = { ink: "#1c2430", faint: "#d9dfe7", paper: "#ffffff", absent: "#eceff3", critical: "#c4122f", warning: "#b36b00",
    info: "#0072b2", action: "#007a5a", nonfinite: "#ff3d1f", lines: ["#0072b2", "#d55e00", "#009e73", "#56b4e9", "#cc79a7"] };
  const DARK = { ink: "#e6eaf0", faint: "#2b3340", paper: "#12161d", absent: "#262d38", critical: "#ff6b7d", warning: "#ffb547",
    info: "#56b4e9", action: "#2fc79a", nonfinite: "#ff5a3c", lines: ["#56b4e9", "#f08c3a", "#2fc79a", "#8fd0f5", "#e39bc3"] };
  const VIRIDIS = [[0, "#482475"], [0.12, "#414487"], [0.25, "#355f8d"], [0.38, "#2a788e"], [0.5, "#21918c"], [0.62, "#22a884"],
    [0.75, "#44bf70"], [0.88, "#7ad151"], [1, "#fde725"]];
  const OPTIONS = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d", "sendDataToCloud"] };
  const look = () => (dark.matches ? DARK : LIGHT);

  // Plotly reads a small HTML in its texts: names from the run must stay letters.
  const inert = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const grouped = (n) => Math.round(n).toLocaleString("en-US");
  const number = (v) => {
    if (v === -Infinity) return "not measured";
    if (!Number.isFinite(v)) return Number.isNaN(v) ? "NaN" : "inf";
    const a = Math.abs(v);
    return a === 0 || (a >= 1e-3 && a < 1e5) ? String(Number(v.toPrecision(3))) : v.toExponential(2);
  };
  const SUPERSCRIPT = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };
  const power = (d) => (Math.abs(d) <= 3 ? String(Number((10 ** d).toPrecision(1))) : `10${[...String(d)].map((c) => SUPERSCRIPT[c]).join("")}`);
  const shorten = (name, width) => {
    if (name.length <= width) return name;
    const head = Math.floor(((width - 1) * 2) / 5);
    return `${name.slice(0, head)}…${name.slice(name.length - (width - 1 - head))}`;
  };
  const floats = (text) => {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    return new Float32Array(bytes.buffer);
  };
  const stepText = (view, c) =>
    view.first[c] === view.last[c] ? `step ${grouped(view.first[c])}` : `steps ${grouped(view.first[c])}–${grouped(view.last[c])}`;

  const decode = (view) => {
    if (!view.cells) {
      view.cells = floats(view.norms);
      for (const band of Object.values(view.metrics)) {
        for (const part of ["low", "mid", "high"]) band[part] = Array.from(floats(band[part]), (v) => (Number.isFinite(v) ? v : null));
      }
    }
    return view;
  };

  // NaN in the cells stands for a non-finite norm, -Infinity for one that was not measured.
  const layerRows = (view, map) => data.layers.map((_, r) => view.first.map((_, c) => map(view.cells[r * view.first.length + c], r, c)));

  const logTicks = (low, high) => {
    const every = Math.max(1, Math.ceil((high - low) / 6));
    const at = [];
    for (let d = Math.ceil(low); d <= high; d += every) at.push(d);
    return { tickvals: at, ticktext: at.map(power) };
  };

  const logAxis = (view, panel) => {
    const values = panel.series.flatMap(([name]) => (view.metrics[name] ? [...view.metrics[name].low, ...view.metrics[name].high] : [])).filter((v) => v > 0);
    const [low, high] = values.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, 0]);
    const every = Math.max(1, Math.ceil(Math.log10(high / low) / 3));
    const at = [];
    for (let d = Math.floor(Math.log10(low)); d <= Math.ceil(Math.log10(high)); d += every) at.push(d);
    return { tickvals: at.map((d) => 10 ** d), ticktext: at.map(power) };
  };

  const heatmap = (view, colours, yaxis, bar) => {
    const hover = layerRows(view, (v, r, c) => `<b>${inert(data.layers[r])}</b><br>${stepText(view, c)}<br>norm ${number(Number.isNaN(v) ? NaN : v)} (${data.stage})`);
    const flat = (name, colour, test) => {
      const z = layerRows(view, (v) => (test(v) ? 1 : null));
      if (!z.some((row) => row.includes(1))) return [];
      return [{ type: "heatmap", name, x: view.edges, z, yaxis, text: hover, hovertemplate: "%{text}<extra></extra>", showscale: false,
        colorscale: [[0, colour], [1, colour]], hoverongaps: false }];
    };
    const [low, high] = data.scale;
    return [
      { type: "heatmap", name: "norms", x: view.edges, z: layerRows(view, (v) => (v > 0 && v < Infinity ? Math.log10(v) : null)), yaxis,
        text: hover, hovertemplate: "%{text}<extra></extra>", hoverongaps: false, colorscale: VIRIDIS, zmin: low, zmax: high,
        colorbar: { ...bar, thickness: 12, title: { text: "gradient norm", side: "right", font: { size: 12 } }, ...logTicks(low, high), outlinewidth: 0 } },
      ...flat("exactly zero", "#000000", (v) => v === 0),
      ...flat("NaN or inf", colours.nonfinite, (v) => Number.isNaN(v)),
    ];
  };

  const lines = (view, panel, colours, yaxis) => {
    const x = view.first.map((f, c) => (f + view.last[c]) / 2);
    const traces = [];
    for (const [name, label, colour, dash] of panel.series) {
      const band = view.metrics[name];
      if (!band) continue;
      const stroke = colours.lines[colour];
      const spread = band.high.some((v, i) => v !== band.low[i]);
      const base = { x, yaxis, mode: "lines", type: "scatter", name: label, showlegend: false, connectgaps: false };
      if (spread) {
        traces.push({ ...base, y: band.low, line: { width: 0 }, hoverinfo: "skip" });
        traces.push({ ...base, y: band.high, line: { width: 1, color: `${stroke}90` }, fill: "tonexty", fillcolor: `${stroke}40`, hoverinfo: "skip" });
      }
      const text = x.map((_, c) => `${stepText(view, c)}<br>${label} ${number(band.mid[c] ?? NaN)}` +
        (spread ? `<br>from ${number(band.low[c] ?? NaN)} to ${number(band.high[c] ?? NaN)}` : ""));
      traces.push({ ...base, y: band.mid, line: { width: 1.6, color: stroke, dash }, mode: x.length < 3 ? "lines+markers" : "lines", text, hovertemplate: "%{text}<extra></extra>" });
    }
    return traces;
  };

  const labelWidth = () => (narrow() ? 12 : 24);
  const narrow = () => document.documentElement.clientWidth < 620;

  const layerTicks = (height, low, high) => {
    const shown = high - low;
    const apart = Math.max(1, Math.ceil((shown * 13) / height));
    const chosen = [];
    const candidates = [...data.worst, ...data.layers.keys()].filter((r) => r >= low && r <= high);
    for (const row of candidates) if (chosen.every((other) => Math.abs(other - row) >= apart)) chosen.push(row);
    const width = labelWidth();
    return { tickvals: chosen, ticktext: chosen.map((r) => {
      const name = inert(shorten(data.layers[r], width));
      return data.worst.includes(r) ? `<b>${name}</b>` : name;
    }) };
  };

  const decorations = (view, colours, rows) => {
    const [left, right] = [view.edges[0], view.edges[view.edges.length - 1]];
    const shapes = [];
    const annotations = [];
    const least = 0.012 * (right - left);
    for (const f of data.findings) {
      const end = f.last === null ? right : f.last + 0.5;
      if (f.first > right || end < left) continue;
      const spare = Math.max(0, least - (end - f.first + 0.5)) / 2;
      const x0 = Math.max(f.first - 0.5 - spare, left);
      const x1 = Math.min(end + spare, right);
      for (const y of rows.lines) {
        shapes.push({ type: "rect", xref: "x", yref: `${y} domain`, x0, x1, y0: 0, y1: 1, fillcolor: colours[f.severity], opacity: 0.09, line: { width: 0 }, layer: "below" });
      }
      for (const [top, bottom] of f.rows) {
        for (const [color, width] of [["#ffffff", 3.5], [colours[f.severity], 2]]) {
          shapes.push({ type: "rect", xref: "x", yref: rows.heat, x0, x1, y0: top - 0.5, y1: bottom + 0.5, line: { color, width } });
        }
      }
    }
    for (const s of data.actionSteps) {
      if (s >= left && s <= right) shapes.push({ type: "line", xref: "x", yref: "paper", x0: s, x1: s, y0: 0, y1: 1, line: { color: colours.action, width: 1, dash: "dot" } });
    }
    if (data.onset) {
      const late = data.onset.step > (left + right) / 2;
      shapes.push({ type: "line", xref: "x", yref: "paper", x0: data.onset.step, x1: data.onset.step, y0: data.onset.lasts ? 0 : rows.top, y1: 1.01, line: { color: colours[data.onset.severity], width: 1.6, dash: "dash" } });
      annotations.push({ xref: "x", yref: "paper", x: data.onset.step, y: 1.01, yanchor: "bottom", xanchor: late ? "right" : "left", showarrow: false,
        text: `<b>${inert(narrow() ? data.onset.short : data.onset.text)}</b>`, font: { color: colours[data.onset.severity], size: 13 } });
    }
    return { shapes, annotations };
  };

  const overview = (view) => {
    decode(view);
    const colours = look();
    const panels = data.panels.filter((p) => p.series.some(([name]) => view.metrics[name]));
    const n = data.layers.length;
    const heatHeight = Math.max(170, Math.min(420, 15 * n + 40));
    const lineHeight = 105;
    const longest = Math.max(...data.layers.map((name) => Math.min(name.length, labelWidth())));
    const margin = { l: Math.max(70, 18 + 7 * longest), r: 8, t: 28, b: 44 };
    const gap = 16;
    const inner = heatHeight + panels.length * (lineHeight + gap);
    const layout = {
      uirevision: closeShown ? "closeup" : "whole", height: inner + margin.t + margin.b, margin, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: colours.absent, hovermode: "closest",
      font: { color: colours.ink, family: "system-ui, sans-serif", size: 12 }, dragmode: narrow() ? false : "zoom",
      modebar: { bgcolor: "rgba(0,0,0,0)", color: colours.faint, activecolor: colours.ink },
      xaxis: { title: { text: "step", standoff: 6 }, anchor: "y", range: [view.edges[0], view.edges[view.edges.length - 1]], gridcolor: colours.faint, zeroline: false, tickformat: ",d", nticks: narrow() ? 4 : 8, ...(view.first.length < 8 ? { tickvals: view.first } : {}), showspikes: true, spikemode: "across", spikethickness: 1, spikedash: "dot", spikecolor: colours.ink },
      yaxis: { domain: [0, heatHeight / inner], range: [n - 0.5, -0.5], showgrid: false, zeroline: false, ...layerTicks(heatHeight, -0.5, n - 0.5) },
    };
    const traces = heatmap(view, colours, "y", { y: heatHeight / inner / 2, len: heatHeight / inner, x: 1.01, tickfont: { size: 11 } });
    const rows = { heat: "y", lines: [], top: heatHeight / inner };
    let bottom = heatHeight + gap;
    [...panels].reverse().forEach((panel, i) => {
      const axis = `y${i + 2}`;
      layout[`yaxis${i + 2}`] = { domain: [bottom / inner, (bottom + lineHeight) / inner], ...(panel.log ? { type: "log", ...logAxis(view, panel) } : { nticks: 4, rangemode: panel.label === "lr" ? "tozero" : "normal" }),
        title: { text: inert(panel.label), font: { size: 12 }, standoff: 4 }, gridcolor: colours.faint, zeroline: false };
      traces.push(...lines(view, panel, colours, axis));
      rows.lines.push(axis);
      bottom += lineHeight + gap;
    });
    Object.assign(layout, decorations(view, colours, rows));
    return [traces, layout];
  };

  const target = document.getElementById("overview");
  let current = data.whole;
  let closeShown = false;

  const profile = (picked) => {
    const colours = look();
    const names = data.layers.map((_, r) => r);
    const view = decode(data.whole);
    const columns = data.profile.map((p) => ({ ...p, values: floats(p.norms) }));
    if (picked !== undefined) {
      columns.push({ label: `${stepText(current, picked)} (picked)`, picked: true, values: data.layers.map((_, r) => current.cells[r * current.first.length + picked]) });
    }
    const traces = columns.map((p, i) => ({
      type: "scatter", mode: names.length > 60 ? "lines" : "lines+markers", x: names, y: Array.from(p.values, (v) => (v > 0 && v < Infinity ? v : null)), name: inert(p.label),
      line: { color: p.onset ? colours[data.onset.severity] : p.picked ? colours.ink : `hsl(${265 - (190 * i) / columns.length}, 55%, ${dark.matches ? 65 : 42}%)`, width: p.onset || p.picked ? 3 : 1.6 },
      text: data.layers.map((name, r) => `<b>${inert(name)}</b><br>${inert(p.label)}<br>norm ${number(p.values[r])}`), hovertemplate: "%{text}<extra></extra>",
    }));
    if (data.fit) traces.push({ type: "scatter", mode: "lines", x: names, y: Array.from(floats(data.fit.line)), name: inert(data.fit.label), line: { color: colours.ink, width: 1.2, dash: "dash" }, hoverinfo: "skip" });
    const shown = columns.flatMap((p) => Array.from(p.values).filter((v) => v > 0 && v < Infinity));
    const decades = Math.log10(shown.reduce((a, b) => Math.max(a, b), 0) / shown.reduce((a, b) => Math.min(a, b), Infinity));
    const every = Math.max(1, Math.ceil(names.length / (narrow() ? 6 : 16)));
    const at = names.filter((r) => r % every === 0);
    return [traces, {
      uirevision: "profile", height: narrow() ? 560 : 380, margin: { l: 64, r: 8, t: 10, b: 90 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", hovermode: "closest",
      font: { color: colours.ink, family: "system-ui, sans-serif", size: 12 }, legend: { orientation: "h", y: 1.02, yanchor: "bottom" },
      xaxis: { title: { text: "layer, input → output" }, tickvals: at, ticktext: at.map((r) => inert(shorten(data.layers[r], 16))), tickangle: -30, gridcolor: colours.faint, zeroline: false },
      yaxis: { type: "log", exponentformat: "power", dtick: decades > 2 ? Math.ceil(decades / 8) : undefined, title: { text: `gradient norm (L2, ${data.stage})` }, gridcolor: colours.faint },
      dragmode: narrow() ? false : "zoom", modebar: { bgcolor: "rgba(0,0,0,0)", color: colours.faint, activecolor: colours.ink },
    }];
  };

  // What the colours of the heatmap mean besides the norm.
  const key = () => {
    const colours = look();
    const { cells } = decode(data.whole);
    const entries = [];
    if (cells.some(Number.isNaN)) entries.push([colours.nonfinite, "NaN or inf"]);
    if (cells.includes(0)) entries.push(["#000000", "exactly zero"]);
    if (cells.includes(-Infinity)) entries.push([colours.absent, "not measured"]);
    if (data.findings.length) entries.push([colours[data.findings[data.findings.length - 1].severity], "outlined: a finding"]);
    if (data.actionSteps.length) entries.push([colours.action, "dotted line: an action"]);
    document.getElementById("key").replaceChildren(...entries.map(([colour, text]) => {
      const item = document.createElement("li");
      const patch = document.createElement("i");
      patch.style.background = colour;
      item.append(patch, text);
      return item;
    }));
  };

  const redraw = () => {
    key();
    Plotly.react(target, ...overview(current), OPTIONS);
    Plotly.react("profile", ...profile(), OPTIONS);
  };

  const choose = (close) => {
    const buttons = [document.getElementById("show-whole"), document.getElementById("show-closeup")];
    const [other, pressed] = close ? buttons : [...buttons].reverse();
    closeShown = close;
    current = close ? data.closeup : data.whole;
    pressed.setAttribute("aria-pressed", "true");
    other.setAttribute("aria-pressed", "false");
    Plotly.react(target, ...overview(current), OPTIONS);
  };

  const charts = () => {
    document.documentElement.classList.add("js");
    Plotly.newPlot(target, ...overview(current), OPTIONS).then(() => {
      target.on("plotly_click", (event) => {
        const column = event.points[0].pointIndex;
        if (!Array.isArray(column)) return;
        document.getElementById("picked").textContent = `Added: ${stepText(current, column[1])}.`;
        Plotly.react("profile", ...profile(column[1]), OPTIONS);
      });
      target.on("plotly_relayout", (change) => {
        if (Object.keys(change).some((key) => key.startsWith("yaxis.range") || key === "yaxis.autorange")) {
          const [bottom, top] = target.layout.yaxis.range;
          const ticks = layerTicks(target.layout.yaxis.domain[1] * (target.layout.height - 72), top, bottom);
          Plotly.relayout(target, { "yaxis.tickvals": ticks.tickvals, "yaxis.ticktext": ticks.ticktext });
        }
      });
    });
    Plotly.newPlot("profile", ...profile(), OPTIONS);
    key();
    dark.addEventListener("change", redraw);
    let wasNarrow = narrow();
    window.addEventListener("resize", () => {
      if (narrow() !== wasNarrow) { wasNarrow = narrow(); redraw(); }
    });
  };

  const buttons = () => {
    const closeup = document.getElementById("show-closeup");
    if (!closeup) return;
    document.getElementById("show-whole").addEventListener("click", () => choose(false));
    closeup.addEventListener("click", () => choose(true));
  };

  const table = () => {
    const whole = document.getElementById("layer-table");
    const body = whole.tBodies[0];
    const rows = [...body.rows];
    const key = (row, column) => {
      const cell = row.cells[column];
      return cell.dataset.key === undefined ? cell.textContent : Number(cell.dataset.key);
    };
    const compare = (a, b) => (typeof a === "number" ? (Number.isNaN(a) ? 1 : Number.isNaN(b) ? -1 : a - b) : a.localeCompare(b, "en", { numeric: true }));
    [...whole.tHead.rows[0].cells].forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = head.textContent;
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const up = head.getAttribute("aria-sort") !== "ascending";
        for (const other of whole.tHead.rows[0].cells) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const sorted = [...rows].sort((a, b) => (up ? 1 : -1) * compare(key(a, column), key(b, column)));
        body.append(...sorted);
      });
    });
    const filter = document.getElementById("filter");
    filter.addEventListener("input", () => {
      const wanted = filter.value.toLowerCase();
      let shown = 0;
      for (const row of rows) {
        row.hidden = !row.textContent.toLowerCase().includes(wanted);
        shown += row.hidden ? 0 : 1;
      }
      document.getElementById("filtered").textContent = `${shown} of ${rows.length} layers`;
    });
  };

  // For a page that renews itself: draw new data where the old were, zoom and filter as they are.
  const renew = (fresh, wanted) => {
    data = fresh;
    closeShown = closeShown && Boolean(data.closeup);
    current = closeShown ? data.closeup : data.whole;
    redraw();
    buttons();
    if (closeShown) choose(true);
    table();
    const filter = document.getElementById("filter");
    filter.value = wanted;
    if (wanted) filter.dispatchEvent(new Event("input"));
  };

  charts();
  buttons();
  table();
  window.gradwatch = { renew };
})();
