// graphql-ws on Node: `node graphql_ws.mjs PORT REDIS_URL SHARDS`. One slot per subscription, the latest value wins.

import { createServer } from 'node:http';
import { buildSchema } from 'graphql';
import { useServer } from 'graphql-ws/use/ws';
import { WebSocketServer } from 'ws';
import { listen, SCHEMA } from './marks.mjs';

const [port, url, shards] = process.argv.slice(2);
const watches = new Map();

async function* watch(portfolioId) {
  const slot = { value: null, wake: null };
  const slots = watches.get(portfolioId) ?? watches.set(portfolioId, new Set()).get(portfolioId);
  slots.add(slot);
  try {
    while (true) {
      if (slot.value === null) await new Promise((resolve) => { slot.wake = resolve; });
      const value = slot.value;
      slot.value = null;
      yield { navUpdates: value };
    }
  } finally {
    slots.delete(slot);
  }
}

const schema = buildSchema(SCHEMA);
schema.getSubscriptionType().getFields().navUpdates.subscribe = (_, { portfolioId }) => watch(portfolioId);

const server = createServer();
useServer({ schema }, new WebSocketServer({ server, path: '/graphql' }));
await listen(url, Number(shards), (id) => watches.has(id), (id, update) => {
  for (const slot of watches.get(id)) {
    slot.value = update;
    if (slot.wake !== null) { slot.wake(); slot.wake = null; }
  }
});
server.listen(Number(port), '127.0.0.1', () => console.log('ready'));
