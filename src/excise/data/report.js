"use strict";
// Draws the figures in the page's own colours, and again when the colour scheme changes.
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  // Only the front is worth zooming into.
  const config = (id) => ({ responsive: true, displaylogo: false,
                            displayModeBar: id === "front" ? "hover" : false,
                            modeBarButtons: [["toImage"], ["zoom2d", "pan2d", "resetScale2d"]] });

  const theme = (layout) => {
    const style = getComputedStyle(document.documentElement);
    const color = (name) => style.getPropertyValue(name).trim();
    const axis = { gridcolor: color("--line"), linecolor: color("--line"), zeroline: false,
                   tickfont: { color: color("--muted") }, title_standoff: 12 };
    return {
      ...layout,
      font: { family: style.getPropertyValue("font-family") || "sans-serif", size: 13,
              color: color("--ink") },
      hoverlabel: { ...layout.hoverlabel, bgcolor: color("--card"), bordercolor: color("--line"),
                    font: { color: color("--ink") } },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: color("--muted"), activecolor: color("--ink") },
      xaxis: { ...axis, ...layout.xaxis },
      yaxis: { ...axis, ...layout.yaxis },
    };
  };

  const draw = () => {
    for (const [id, figure] of Object.entries(figures)) {
      Plotly.react(`plot-${id}`, figure.data, theme(figure.layout), config(id));
    }
  };

  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
})();
