import { mountShell } from "./shell.js";

mountShell("Chat", { onKey: () => location.reload() });
