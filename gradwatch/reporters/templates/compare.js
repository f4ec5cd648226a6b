"use strict";
(() => {
  const { traces, layout } = JSON.parse(document.getElementById("data").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const options = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d"] };

  const number = (v) => (v >= 1e-3 && v < 1e5 ? String(Number(v.toPrecision(3))) : v.toExponential(2));
  for (const t of traces) {
    if (t.type === "heatmap") t.text = t.z.map((row, r) => row.map((v) => `<b>${t.layers[r]}</b><br>×${number(10 ** v)}`));
  }

  const coloured = () => {
    const [ink, faint] = dark.matches ? ["#e6eaf0", "#2b3340"] : ["#1c2430", "#d9dfe7"];
    const narrow = document.documentElement.clientWidth < 620;
    const axes = Object.fromEntries(Object.entries(layout).filter(([name]) => /^[xy]axis/.test(name))
      .map(([name, axis]) => [name, { gridcolor: faint, zeroline: false, ...axis }]));
    return { ...layout, ...axes, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", dragmode: narrow ? false : "zoom",
      font: { color: ink, family: "system-ui, sans-serif", size: 12 }, hovermode: "closest",
      legend: { orientation: "h", y: 1.01, yanchor: "bottom" }, modebar: { bgcolor: "rgba(0,0,0,0)", color: faint, activecolor: ink } };
  };

  const painted = () => traces.map((t) => (dark.matches && t.darkscale ? { ...t, colorscale: t.darkscale } : t));

  document.documentElement.classList.add("js");
  Plotly.newPlot("compared", painted(), coloured(), options);
  dark.addEventListener("change", () => Plotly.react("compared", painted(), coloured(), options));
})();
