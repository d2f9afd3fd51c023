"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const logarithmic = new Set();
  let axis = "steps";
  let chosen = null; // the theme that was clicked; the system's otherwise

  const element = (index) => document.getElementById(`chart-${index}`);
  const tone = (name) => getComputedStyle(root).getPropertyValue(name).trim();

  function xOf(chart, index) {
    const places = chart.xs[index];
    if (!places) return chart.data[index].x;
    return axis === "seconds" ? places.seconds.map((value) => value / data.timeUnit) : places[axis];
  }

  function xTitle(chart) {
    if (chart.key === "timeline") return data.timeLabel;
    return chart.xs.some((places) => places) ? data.axes[axis] : "";
  }

  function layout(chart, index) {
    const grid = { gridcolor: tone("--line"), zerolinecolor: tone("--line"), linecolor: tone("--line"), automargin: true };
    const small = { font: { size: 12, color: tone("--soft") }, standoff: 8 };
    const legend = chart.data.filter((trace) => trace.showlegend !== false).length > 1;
    return {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: tone("--ink") },
      margin: { l: 52, r: 38, t: 12, b: 44 },
      modebar: { orientation: "v", bgcolor: "rgba(0,0,0,0)", color: tone("--soft"), activecolor: tone("--accent") },
      hovermode: chart.key === "timeline" ? "closest" : "x unified",
      hoverlabel: { bgcolor: tone("--card"), bordercolor: tone("--line"), font: { color: tone("--ink") }, namelength: -1 },
      showlegend: legend,
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", bgcolor: "rgba(0,0,0,0)", traceorder: "normal" },
      ...chart.layout,
      xaxis: { ...grid, title: { text: xTitle(chart), ...small }, ...(chart.layout.xaxis || {}) },
      yaxis: {
        ...grid,
        title: { text: chart.unit, ...small },
        type: logarithmic.has(index) ? "log" : "linear",
        exponentformat: "power",
        ...(chart.layout.yaxis || {}),
      },
    };
  }

  const traces = (chart) => chart.data.map((trace, index) => ({ ...trace, x: xOf(chart, index) }));

  function draw(chart, index) {
    return Plotly.react(element(index), traces(chart), layout(chart, index), {
      responsive: true,
      displaylogo: false,
      modeBarButtonsToRemove: ["sendChartToCloud", "select2d", "lasso2d", "autoScale2d"],
    });
  }

  function drawAll() {
    return Promise.all(data.charts.map(draw));
  }

  function dress() {
    root.dataset.theme = chosen || (system.matches ? "dark" : "light");
    // Looks only: which traces are hidden and what is zoomed stays.
    return Promise.all(data.charts.map((chart, index) => {
      const look = layout(chart, index);
      return Plotly.relayout(element(index), {
        font: look.font,
        hoverlabel: look.hoverlabel,
        modebar: look.modebar,
        ...Object.fromEntries(["xaxis", "yaxis"].flatMap((name) =>
          ["gridcolor", "zerolinecolor", "linecolor"].map((part) => [`${name}.${part}`, look[name][part]])
            .concat([[`${name}.title.font.color`, look[name].title.font.color]]))),
      });
    }));
  }

  function chooseAxis(name) {
    axis = name;
    for (const button of document.querySelectorAll("#axis button")) {
      button.setAttribute("aria-pressed", String(button.dataset.axis === axis));
    }
    return Promise.all(data.charts.map((chart, index) => {
      const moving = chart.xs.flatMap((places, position) => (places ? [position] : []));
      if (!moving.length) return null;
      return Plotly.update(
        element(index),
        { x: moving.map((position) => xOf(chart, position)) },
        { "xaxis.title.text": xTitle(chart), "xaxis.autorange": true },
        moving,
      );
    }));
  }

  function toggleLog(button) {
    const index = Number(button.dataset.chart);
    if (!logarithmic.delete(index)) logarithmic.add(index);
    button.setAttribute("aria-pressed", String(logarithmic.has(index)));
    return Plotly.relayout(element(index), {
      "yaxis.type": logarithmic.has(index) ? "log" : "linear",
      "yaxis.autorange": true,
    });
  }

  document.getElementById("axis").addEventListener("click", (event) => {
    if (event.target.dataset.axis) chooseAxis(event.target.dataset.axis);
  });
  document.getElementById("theme").addEventListener("click", () => {
    chosen = root.dataset.theme === "dark" ? "light" : "dark";
    dress();
  });
  for (const button of document.querySelectorAll("button.log")) {
    button.addEventListener("click", () => toggleLog(button));
  }
  const only = document.getElementById("differences");
  if (only) {
    only.addEventListener("change", () => {
      document.getElementById("settings").classList.toggle("only-differences", only.checked);
    });
  }
  system.addEventListener("change", dress);

  root.dataset.theme = system.matches ? "dark" : "light";
  drawAll().then(() => { root.dataset.drawn = "yes"; });
})();
