// node typeset.cjs FOLDER_OF_MATHJAX < [[tex, is it a display], …]; writes {html: […], css}.
MathJax = {
  loader: {
    paths: { mathjax: process.argv[2] },
    load: ["input/tex-full", "output/chtml", "adaptors/liteDOM", "a11y/assistive-mml"],
    require,
  },
  tex: { packages: ["base", "ams", "boldsymbol", "newcommand", "textmacros"] },
  chtml: { fontURL: "." },
};
require(`${process.argv[2]}/startup.js`);
MathJax.startup.promise.then(() => {
  const { adaptor } = MathJax.startup;
  const formulas = JSON.parse(require("fs").readFileSync(0, "utf-8"));
  const html = formulas.map(([tex, display]) => adaptor.outerHTML(MathJax.tex2chtml(tex, { display })));
  process.stdout.write(JSON.stringify({ html, css: adaptor.textContent(MathJax.chtmlStylesheet()) }));
});
