// Typesets the formulas, which are \( \) and \[ \] in elements of the class arithmatex.
for (const element of document.querySelectorAll(".arithmatex")) {
  katex.render(element.textContent.slice(2, -2), element, { displayMode: element.tagName === "DIV" });
}
