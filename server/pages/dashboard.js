import { mountShell } from "./shell.js";

mountShell("Dashboard", { onKey: () => location.reload() });
