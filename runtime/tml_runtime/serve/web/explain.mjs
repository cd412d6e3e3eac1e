// Why the service took no WebSocket. A browser does not tell its page what HTTP said.

/** A sentence for people. */
export async function whyRefused(token) {
  let health;
  try {
    health = await fetch("healthz");
  } catch {
    return "Nothing answers at this address. Is the service running?";
  }
  if (!health.ok) return "The service is not ready: its model does not run.";
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  const status = await fetch("status", { headers });
  if (status.ok) {
    const { service, report } = await status.json();
    const { limit } = report.admission;
    if (service.sessions.length >= limit) {
      return `All ${limit} sessions are taken. Try again when one has ended.`;
    }
  }
  return `The service refused this page: start it with --allow-origin ${location.origin}`;
}
