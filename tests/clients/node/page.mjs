// Runs a script on a page of the server, in the system's Chromium, and prints what it logged.
// node page.mjs CHROMIUM PROFILE PAGE WANTED < script
import { readFileSync } from "node:fs";
import { chromium } from "playwright-core";

const [executablePath, profile, page_url, wanted] = process.argv.slice(2);
const script = readFileSync(0, "utf8");
const context = await chromium.launchPersistentContext(profile, {
  executablePath,
  headless: true,
  bypassCSP: true, // the script is ours, whatever the server's pages allow
  args: [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
  ],
});
try {
  const page = context.pages()[0] ?? (await context.newPage());
  await page.goto(page_url);
  const logged = [];
  await new Promise((resolve, reject) => {
    setTimeout(() => reject(new Error(`not logged: ${wanted}; but: ${logged}`)), 120_000).unref();
    page.on("pageerror", reject);
    page.on("console", (message) => {
      logged.push(message.text());
      if (logged.join("\n").includes(wanted)) resolve();
    });
    page.addScriptTag({ content: script }).catch(reject);
  });
  console.log(logged.join("\n"));
} finally {
  await context.close();
}
