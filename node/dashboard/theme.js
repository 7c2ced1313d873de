// Runs before the page is drawn: the theme that was chosen here last, and the banner for when nothing comes any more.
{
  const chosen = localStorage.getItem("shoal-theme");
  if (chosen) document.documentElement.dataset.theme = chosen;
  let heard = Date.now();
  window.shoalAlive = () => {
    heard = Date.now();
    delete document.documentElement.dataset.silent;
  };
  setInterval(() => {
    if (Date.now() - heard > 4000) document.documentElement.dataset.silent = new Date(heard).toLocaleTimeString();
  }, 500);
}
