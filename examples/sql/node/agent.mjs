// The SQL agent in JavaScript on the stock `openai` package: node agent.mjs TASK, where TASK is JSON with `database`,
// `schema` and `question`. OPENAI_BASE_URL and OPENAI_API_KEY say where the model is; the last line it prints is the query.

import { readFile } from "node:fs/promises";
import OpenAI from "openai";
import initSqlJs from "sql.js";

const MOST_TURNS = 4; // a query, two corrections, the answer
const ROWS_SHOWN = 3;
const TOOLS = [
  {
    type: "function",
    function: {
      name: "run_sql",
      description: "Run a query: its rows, or the error and the columns.",
      parameters: { type: "object", properties: { sql: { type: "string" } }, required: ["sql"] },
    },
  },
];

/** The first rows of the query, or the error and the columns of the tables it named. */
function runSql(database, sql) {
  let error = "no rows";
  try {
    const [result] = database.exec(sql);
    if (result?.values.length) {
      const shown = result.values.slice(0, ROWS_SHOWN).map((row) => ` ( ${row.join(" , ")} )`);
      return `rows:${shown.join("")}`;
    }
  } catch (complaint) {
    error = complaint.message;
  }
  const named = new Set(sql.toLowerCase().match(/\w+/g));
  const [tables] = database.exec("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY rowid");
  const columns = tables.values
    .map(([table]) => table)
    .filter((table) => named.has(table.toLowerCase()))
    .map((table) => `${table}: ${database.exec(`SELECT name FROM pragma_table_info('${table}')`)[0].values.join(" ")}`);
  return [error, ...columns].join("\n");
}

function use(database, call) {
  try {
    const { sql } = JSON.parse(call.function.arguments);
    return typeof sql === "string" ? runSql(database, sql) : "error: run_sql takes one argument, sql";
  } catch {
    return "error: the arguments are no JSON";
  }
}

async function answer(task) {
  const SQL = await initSqlJs();
  const database = new SQL.Database(await readFile(task.database)); // a copy in memory: nothing it does is kept
  const client = new OpenAI();
  const messages = [
    { role: "system", content: "Try a query with run_sql, then answer with it." },
    { role: "user", content: `${task.schema}\n${task.question}` },
  ];
  for (let turn = 0; turn < MOST_TURNS; turn++) {
    const model = process.env.SQL_MODEL ?? "sql";
    const reply = await client.chat.completions.create({ model, messages, tools: TOOLS, temperature: 0 });
    const { message } = reply.choices[0];
    if (!message.tool_calls?.length) return message.content ?? "";
    messages.push(message);
    for (const call of message.tool_calls) {
      messages.push({ role: "tool", tool_call_id: call.id, content: use(database, call) });
    }
  }
  return "";
}

console.log(await answer(JSON.parse(process.argv[2])));
