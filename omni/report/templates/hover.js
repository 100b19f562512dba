for (const svg of document.querySelectorAll("svg")) {
  const texts = [...svg.parentNode.querySelectorAll("figcaption span:nth-child(2), span b")];
  const before = texts.map(e => e.textContent), cursor = svg.querySelector(".cursor");
  const curves = [...svg.querySelectorAll("[data-values]")].map(path => {
    const values = path.dataset.values.split(" ").map(v => v.split(","));
    const at = path.getAttribute("d").match(/[\d.]+(?=,)/g);
    return values.map(([step, value], i) => ({x: +at[i], step, value}));
  });
  svg.onpointermove = event => {
    const box = svg.getBoundingClientRect(), size = svg.viewBox.baseVal;
    const x = (event.clientX - box.left) / box.width * size.width;
    const nearest = of => of.reduce((a, b) => Math.abs(b.x - x) < Math.abs(a.x - x) ? b : a);
    const near = curves.map(nearest), point = nearest(near);
    [`step ${point.step}`, ...near.map(p => p.value)].forEach((t, i) => texts[i].textContent = t);
    cursor.setAttribute("d", `M${point.x} 16V196`);
  };
  svg.onpointerleave = () => {
    texts.forEach((e, i) => e.textContent = before[i]);
    cursor.removeAttribute("d");
  };
}
