// mercurius with its JIT: `node mercurius.mjs PORT REDIS_URL SHARDS`.

import Fastify from 'fastify';
import mercurius from 'mercurius';
import { listen, SCHEMA } from './marks.mjs';

const [port, url, shards] = process.argv.slice(2);
const watched = new Set();
const app = Fastify();
await app.register(mercurius, {
  schema: SCHEMA,
  resolvers: {
    Query: { ok: () => true },
    Subscription: {
      navUpdates: {
        subscribe: (_, { portfolioId }, { pubsub }) => {
          watched.add(portfolioId);
          return pubsub.subscribe(portfolioId);
        },
      },
    },
  },
  subscription: true,
  jit: 1,
});
await app.listen({ port: Number(port), host: '127.0.0.1' });
await listen(url, Number(shards), (id) => watched.has(id), (id, update) => {
  app.graphql.pubsub.publish({ topic: id, payload: { navUpdates: update } });
});
console.log('ready');
