// What open_report.py asks of the page: counts of images and charts, and a line for each fault.
// It is evaluated in the page, as a function of the width in CSS pixels of the window that the device has.
async (width) => {
  const LEAST = { chartWidth: 200, chartHeight: 100, text: 9, bodyText: 14, slack: 2 };
  const MARKS = "path, polyline, polygon, circle, rect, line";
  // What these hold is a part that others draw, or drawn without any data.
  const NO_MARKS = "defs, clipPath, mask, marker, pattern, symbol, .axis, .grid";
  // The colour of axes and grids in our charts (experiments/src/report/plots.rs).
  const FAINT = "rgb(215, 215, 215)";
  const BODY = "p, li, dd, blockquote";
  const NOT_BODY = "figure, table, header, footer, nav, small, sub, sup, code, pre, svg";
  const faults = [];
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const short = (text) => text.trim().replace(/\s+/g, " ").slice(0, 60);

  function name(element) {
    const id = element.id ? `#${element.id}` : "";
    const says = element.alt || element.getAttribute("aria-label") || element.textContent || element.src || "";
    const home = element.parentElement?.closest("[id]");
    return `<${element.localName}${id}> "${short(says)}"${!id && home ? ` in #${home.id}` : ""}`;
  }
  const fault = (kind, element, what) => faults.push(`${kind}: ${name(element)} ${what}`);

  // An image may wait until it is near the window, sideways inside its own scroller too.
  async function showEverything() {
    for (const details of document.querySelectorAll("details")) details.open = true;
    const frame = () => new Promise(requestAnimationFrame);
    const show = async (top) => { scrollTo({ top, behavior: "instant" }); await frame(); await frame(); };
    for (let top = 0; top < document.documentElement.scrollHeight; top += innerHeight) await show(top);
    for (const image of [...document.images].filter((image) => !image.complete)) {
      image.scrollIntoView({ behavior: "instant" });
      const late = new Promise((stop) => setTimeout(stop, 5000));
      await Promise.race([image.decode().catch(() => {}), late]);
    }
    await document.fonts.ready;
    await show(0);
  }

  function checkImage(image) {
    if (!image.complete || image.naturalWidth === 0) fault("image", image, `did not load: ${short(image.src)}`);
    if (!image.alt.trim()) fault("image", image, `has no alt: ${short(image.src)}`);
  }

  function isMark(mark, chart) {
    const style = getComputedStyle(mark);
    const shape = mark.getBBox();
    const box = mark.getBoundingClientRect();
    if (mark.closest(NO_MARKS) || style.stroke === FAINT || (style.fill === "none" && style.stroke === "none")) return false;
    const background = box.width > 0.95 * chart.width && box.height > 0.95 * chart.height;
    if (mark.localName === "rect") return shape.width > 0 && shape.height > 0 && !background;
    return shape.width > 0 || shape.height > 0;
  }

  function checkChart(svg) {
    const box = svg.getBoundingClientRect();
    const size = `${box.width.toFixed()} x ${box.height.toFixed()}`;
    const least = `${LEAST.chartWidth} x ${LEAST.chartHeight}`;
    if (box.width < LEAST.chartWidth || box.height < LEAST.chartHeight)
      fault("chart", svg, `is ${size} px, at least ${least} are readable`);
    if (!all(MARKS, svg).some((mark) => isMark(mark, box))) fault("chart", svg, "draws no mark");
    const title = svg.getAttribute("aria-label") ?? svg.querySelector(":scope > title")?.textContent ?? "";
    if (!title.trim()) fault("chart", svg, "has neither <title> nor aria-label");
  }

  function checkCount(attribute, found) {
    const main = document.querySelector("main");
    const stated = main?.getAttribute(attribute);
    if (found === 0 || stated !== String(found))
      faults.push(`count: <main> states ${attribute}=${stated}, found ${found}`);
  }

  function scrollsInside(element) {
    for (let box = element.parentElement; box && box !== document.body; box = box.parentElement)
      if (getComputedStyle(box).overflowX !== "visible") return true;
    return false;
  }

  // A phone zooms out until a page that is too wide fits its window, so the device's width counts, not innerWidth.
  function checkWidth() {
    const wide = document.documentElement.scrollWidth;
    if (wide <= width + 1) return;
    const past = all("body *").filter((e) => e.getBoundingClientRect().right > width + 1 && !scrollsInside(e));
    fault("width", past[0] ?? document.body, `makes the page ${wide} px wide in a window of ${width}`);
  }

  function scale(element) {
    const m = element instanceof SVGElement && element.getScreenCTM?.();
    if (m) return Math.sqrt(Math.abs(m.a * m.d - m.b * m.c));
    const { width, height } = element.getBoundingClientRect();
    const ratio = Math.sqrt((width * height) / (element.offsetWidth * element.offsetHeight));
    // Offsets are whole pixels, so a small box seems scaled where it is not.
    return Number.isFinite(ratio) && Math.abs(ratio - 1) > 0.06 ? ratio : 1;
  }

  function checkTextSize(element) {
    const px = parseFloat(getComputedStyle(element).fontSize) * scale(element);
    const least = element.closest(BODY) && !element.closest(NOT_BODY) ? LEAST.bodyText : LEAST.text;
    if (px < least - 0.01) fault("small text", element, `is ${px.toFixed(1)} px, at least ${least} are legible`);
  }

  function checkCut(text) {
    let svg = text.ownerSVGElement;
    while (svg.ownerSVGElement) svg = svg.ownerSVGElement;
    const [inner, outer] = [text.getBoundingClientRect(), svg.getBoundingClientRect()];
    const past = { left: outer.left - inner.left, right: inner.right - outer.right,
                   top: outer.top - inner.top, bottom: inner.bottom - outer.bottom };
    for (const [side, px] of Object.entries(past))
      if (px > LEAST.slack) fault("cut text", text, `lies ${px.toFixed(1)} px past the ${side} of its svg`);
  }

  function shownTextElements() {
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    const parents = new Set();
    while (walker.nextNode()) if (walker.currentNode.data.trim()) parents.add(walker.currentNode.parentElement);
    return [...parents].filter((e) => e.checkVisibility({ visibilityProperty: true }) && !e.closest("defs, symbol"));
  }

  await showEverything();
  const charts = all("figure.chart svg").filter((svg) => !svg.ownerSVGElement);
  const texts = shownTextElements();
  [...document.images].forEach(checkImage);
  charts.forEach(checkChart);
  checkCount("data-images", document.images.length);
  checkCount("data-charts", charts.length);
  checkWidth();
  texts.forEach(checkTextSize);
  texts.filter((element) => element.localName === "text").forEach(checkCut);
  return { images: document.images.length, charts: charts.length, faults };
}
