// The settings beside the conversation. They live in this tab's session storage and nowhere else.

const FIELDS = ["system", "temperature", "max-tokens", "ser-on", "ser-minimum", "ser-threshold", "plain"];
const STORE = "mla-jax.settings";
const KEY_STORE = "mla-jax.key";

const find = (id) => document.getElementById(id);

function stored(name) {
  try {
    return sessionStorage.getItem(name);
  } catch {
    return null; // storage is switched off; the page works without
  }
}

function store(name, value) {
  try {
    sessionStorage.setItem(name, value);
  } catch {
    return; // as above
  }
}

export class Settings {
  constructor(onKey) {
    this.touched = new Set();
    this.numExperts = 0;
    this.load();
    for (const id of FIELDS) find(id).addEventListener("input", () => this.onInput(id));
    find("api-key").addEventListener("change", () => {
      store(KEY_STORE, this.key);
      onKey();
    });
    this.describe();
  }

  load() {
    find("api-key").value = stored(KEY_STORE) ?? "";
    for (const [id, value] of Object.entries(JSON.parse(stored(STORE) ?? "{}"))) {
      const field = find(id);
      if (field.type === "checkbox") field.checked = value;
      else field.value = value;
      this.touched.add(id);
    }
  }

  onInput(id) {
    this.touched.add(id);
    const valueOf = (field) => (field.type === "checkbox" ? field.checked : field.value);
    const values = [...this.touched].map((name) => [name, valueOf(find(name))]);
    store(STORE, JSON.stringify(Object.fromEntries(values)));
    this.describe();
  }

  // Takes the server's own settings for whatever the reader has not moved.
  serve({ temperature, numExperts }) {
    this.numExperts = numExperts;
    find("experts").hidden = numExperts < 2;
    find("ser-minimum").max = String(numExperts);
    if (!this.touched.has("ser-minimum")) find("ser-minimum").value = String(Math.ceil(numExperts / 2));
    if (Number.isFinite(temperature) && !this.touched.has("temperature")) {
      find("temperature").value = String(temperature);
    }
    this.describe();
  }

  describe() {
    const temperature = Number(find("temperature").value);
    const minimum = Number(find("ser-minimum").value);
    const threshold = Number(find("ser-threshold").value);
    const isOn = find("ser-on").checked;
    find("temperature-value").textContent = temperature === 0 ? "0, the likeliest" : temperature.toFixed(2);
    find("ser-minimum-value").textContent = `${minimum} of ${this.numExperts}`;
    find("ser-threshold-value").textContent = `${threshold.toFixed(2)} of the best`;
    find("ser-minimum").disabled = find("ser-threshold").disabled = !isOn;
    find("ser-hint").textContent = this.hint(isOn, minimum, threshold);
  }

  hint(isOn, minimum, threshold) {
    if (!isOn) return "Off: the server's own setting holds.";
    if (minimum >= this.numExperts) return `All ${this.numExperts} experts of a token: none is left out.`;
    if (threshold === 1) return `Exactly ${minimum} of a token's ${this.numExperts} experts.`;
    const share = threshold.toFixed(2);
    const others = `others from ${share} of the best score on`;
    return `${minimum} to ${this.numExperts} experts a token: the best ${minimum}, and ${others}.`;
  }

  get key() {
    return find("api-key").value.trim();
  }

  get isPlain() {
    return find("plain").checked;
  }

  // The fields of a request that the reader chose; what is left out is the server's to choose.
  get request() {
    const fields = { timings_per_token: true };
    const maxTokens = Number.parseInt(find("max-tokens").value, 10);
    if (this.touched.has("temperature")) fields.temperature = Number(find("temperature").value);
    if (maxTokens > 0) fields.max_tokens = maxTokens;
    if (this.numExperts > 1 && find("ser-on").checked) {
      fields.ser = `${find("ser-minimum").value},${find("ser-threshold").value}`;
    }
    return fields;
  }

  get systemMessages() {
    const content = find("system").value.trim();
    return content ? [{ role: "system", content }] : [];
  }
}
