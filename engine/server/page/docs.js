// The page at /docs: what openapi.json says, as tables.

const place = document.querySelector("#operations");

/** Of a path of the API, whatever prefix the page is behind. */
function address(path) {
  return `${new URL(".", document.baseURI)}${path.slice(1)}`;
}

document.querySelector("#base").textContent = address("/v1");

function element(name, text = "", children = []) {
  const made = document.createElement(name);
  made.textContent = text;
  made.append(...children);
  return made;
}

function table(heads, rows) {
  const head = element("tr", "", heads.map((text) => element("th", text)));
  const body = rows.map((cells) => element("tr", "", cells.map((text) => element("td", text))));
  return element("table", "", [element("thead", "", [head]), element("tbody", "", body)]);
}

/** The schema itself, where it is a reference or one of several of which the other is null. */
function resolved(api, schema) {
  const found = schema.anyOf?.find((one) => one.type !== "null") ?? schema;
  const name = found.$ref?.split("/").pop();
  return { ...schema, ...(name ? api.components.schemas[name] : found) };
}

/** A bound that JavaScript does not count exactly was rounded up to a power of two. */
function bound(number) {
  return number <= Number.MAX_SAFE_INTEGER ? String(number) : `2^${Math.log2(number)} - 1`;
}

function described(api, schema) {
  const found = resolved(api, schema);
  const many = found.items && `list of ${described(api, found.items)}`;
  const type = found.const ?? found.enum?.join(", ") ?? many ?? (found.contentMediaType ? "file" : found.type);
  const low = found.minimum ?? found.exclusiveMinimum ?? found.minLength;
  const high = found.maximum ?? found.maxLength;
  const limits = high === undefined ? "" : `${low === undefined ? "up" : bound(low)} to ${bound(high)}${found.maxLength ? " characters" : ""}`;
  return [type, limits, schema.description].filter(Boolean).join("; ");
}

function fields(api, content) {
  const [kind, { schema }] = Object.entries(content)[0];
  const body = resolved(api, schema);
  const rows = Object.entries(body.properties).map(([name, one]) => {
    const needed = body.required?.includes(name);
    return [name, described(api, one), needed ? "needed" : String(one.default ?? "")];
  });
  return [Object.assign(element("p", kind), { className: "kind" }), table(["field", "value", "default"], rows)];
}

function example(path, content, locked) {
  const kind = Object.keys(content ?? {})[0];
  const key = locked ? ' -H "Authorization: Bearer KEY"' : "";
  const sent = { "application/json": ` --json '{"prompt": "a fox"}'`, "multipart/form-data": ` -F prompt="a fox" -F image=@fox.png` };
  return element("pre", `curl ${address(path.replace(/{(\w+)}/g, (_, name) => name.toUpperCase()))}${key}${sent[kind] ?? ""}`);
}

function operation(api, path, method, one) {
  const content = one.requestBody?.content;
  const answers = Object.entries(one.responses).map(([code, { description }]) => [code, description]);
  return element("section", "", [
    element("h2", `${method.toUpperCase()} ${path}`),
    element("p", one.description ?? one.summary),
    example(path, content, one.security?.length),
    ...(content ? fields(api, content) : []),
    element("details", "", [element("summary", "Answers"), table(["status", "meaning"], answers)]),
  ]);
}

try {
  const answer = await fetch("openapi.json");
  if (!answer.ok) throw new Error(`it was answered with ${answer.status}`);
  const api = await answer.json();
  const found = Object.entries(api.paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, one]) => operation(api, path, method, one)),
  );
  place.replaceChildren(...found);
} catch (error) {
  document.querySelector("#state").textContent = `openapi.json could not be read: ${error.message}`;
}
