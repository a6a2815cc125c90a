// What is hard to read or does not fit on the page: a list of [what, where, number]. Highlighted code is left out: its
// colors are behind a filter.
() => {
  const found = [];
  const brush = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const channels = (color) => {
    brush.clearRect(0, 0, 1, 1);
    brush.fillStyle = color;
    brush.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = brush.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const luminance = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((c) => ((c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const over = ([r, g, b, a], under) => [r, g, b].map((c, i) => c * a + under[i] * (1 - a));
  const behind = (element) => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) {
      const style = getComputedStyle(at);
      if (style.backgroundImage !== "none") return null; // not one color
      layers.push(channels(style.backgroundColor));
      if (layers.at(-1)[3] === 1) break;
    }
    return layers.reverse().reduce((under, layer) => over(layer, under), [255, 255, 255]);
  };
  const isDark = luminance(behind(document.body)) < 0.2;
  const name = (element) =>
    `${element.tagName.toLowerCase()}.${element.className} ${(element.textContent || element.value || "").trim().slice(0, 40)}`;
  const isVisible = (element) => {
    const box = element.getBoundingClientRect();
    return box.width > 1 && box.height > 1 && element.checkVisibility({ opacityProperty: true, visibilityProperty: true });
  };
  for (const element of document.body.querySelectorAll("*")) {
    if (!isVisible(element)) continue;
    const box = element.getBoundingClientRect(), style = getComputedStyle(element);
    const hasText = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    const isField = element.matches("input:not([type=range], [type=checkbox], [type=radio]), textarea");
    if ((hasText || (isField && element.value)) && !element.matches(":disabled, :disabled *, style, script, .cm-line *")) {
      const under = behind(element);
      if (under) {
        const [a, b] = [luminance(over(channels(style.color), under)), luminance(under)].sort((x, y) => x - y);
        const contrast = (b + 0.05) / (a + 0.05);
        if (contrast < 4.5) found.push(["contrast", name(element), Math.round(contrast * 100) / 100]);
      }
    }
    const own = channels(style.backgroundColor);
    if (isDark && own[3] > 0.5 && luminance(own) > 0.7 && box.width * box.height > 2000)
      found.push(["white", name(element), Math.round(box.width * box.height)]);
  }
  const excess = document.documentElement.scrollWidth - innerWidth;
  if (excess > 0) found.push(["too wide", "page", excess]);
  return found;
}
