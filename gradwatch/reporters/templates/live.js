"use strict";
(() => {
  const EVERY = 1500;
  const name = document.documentElement.dataset.run;
  let version = document.documentElement.dataset.version;

  const tell = (state) => {
    const news = document.getElementById("news");
    const items = state.news.map((n) => {
      const item = document.createElement("li");
      const severity = document.createElement("b");
      severity.className = n.severity;
      severity.textContent = `${n.severity}${n.open ? "" : " (over)"}, step ${n.step.toLocaleString("en-US")}: `;
      item.append(severity, n.text);
      return item;
    });
    const now = state.status === "running" ? "Live" : `The run is ${state.status}`;
    document.getElementById("pulse").textContent = `${now}${state.step === null ? "" : `, step ${state.step.toLocaleString("en-US")}`}`;
    news.hidden = state.status !== "running";
    const text = items.map((i) => i.textContent).join("|");
    if (news.dataset.text !== text) {
      news.dataset.text = text;
      news.replaceChildren(...items);
    }
  };

  // The new page takes the place of the old one around the charts, which stay and keep their zoom.
  const renew = async () => {
    const answer = await fetch(`run?name=${encodeURIComponent(name)}`);
    if (!answer.ok) return;
    const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
    const data = fresh.getElementById("data");
    if (!data || !window.gradwatch) {
      if (data) window.location.reload();
      return;
    }
    const opened = [...document.querySelectorAll("main details[open] > summary")].map((s) => s.textContent);
    const filter = document.getElementById("filter");
    const [wanted, focused] = [filter.value, document.activeElement === filter];
    const main = document.adoptNode(fresh.querySelector("main"));
    for (const id of ["overview", "profile"]) main.querySelector(`#${id}`).replaceWith(document.getElementById(id));
    document.querySelector("main").replaceWith(main);
    document.querySelector("header").replaceWith(document.adoptNode(fresh.querySelector("header")));
    for (const s of main.querySelectorAll("details > summary")) if (opened.includes(s.textContent)) s.parentElement.open = true;
    document.title = fresh.title;
    version = fresh.documentElement.dataset.version;
    window.gradwatch.renew(JSON.parse(data.textContent), wanted);
    if (focused) document.getElementById("filter").focus();
  };

  const look = async () => {
    try {
      const answer = await fetch(`state?name=${encodeURIComponent(name)}`);
      if (answer.ok) {
        const state = await answer.json();
        tell(state);
        if (state.version !== version && state.ready) await renew();
      } else {
        document.getElementById("pulse").textContent = `No answer (${answer.status})`;
      }
    } catch (error) {
      console.error(error);
      document.getElementById("pulse").textContent = "The server does not answer";
    }
    window.setTimeout(look, EVERY);
  };
  look();
})();
