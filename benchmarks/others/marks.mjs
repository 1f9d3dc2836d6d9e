// Frames of marks (engine/marks.py), decoded for the servers that navstream is measured beside.

import { createClient } from 'redis';

const HEADER_BYTES = 4 + 4 + 7 * 8;
const GROUP_BYTES = 8;
const QUALITIES = ['LIVE', 'CLOSED', 'DELAYED', 'STALE', 'HALTED', 'MISSING'];

// The columns of a mark, all int64, in their order.
const COLUMNS = [
  'nav', 'cash', 'receivables', 'positionsValue', 'unrealized', 'realized', 'fees', 'income', 'flows', 'trading',
  'corporate', 'dayPnl', 'dayPnlRatio', 'dayCutAt', 'asOf', 'sequence', 'ledgerSequence', 'quality',
];
const MARK_BYTES = COLUMNS.length * 8;
const AT = Object.fromEntries(COLUMNS.map((name, index) => [name, index * 8]));

function amount(micro) {
  const negative = micro < 0n;
  const digits = (negative ? -micro : micro).toString().padStart(7, '0');
  const text = `${digits.slice(0, -6)}.${digits.slice(-6)}`.replace(/\.?0+$/, '');
  return negative && text !== '0' ? `-${text}` : text;
}

function show(data, at) {
  return {
    nav: amount(data.readBigInt64LE(at + AT.nav)),
    cash: amount(data.readBigInt64LE(at + AT.cash)),
    positionsValue: amount(data.readBigInt64LE(at + AT.positionsValue)),
    quality: QUALITIES[Number(data.readBigInt64LE(at + AT.quality))],
    asOf: new Date(Number(data.readBigInt64LE(at + AT.asOf) / 1000000n)).toISOString(),
    sequence: Number(data.readBigInt64LE(at + AT.sequence)),
  };
}

// Calls `deliver(portfolioId, update)` for each row of each frame whose portfolio `wanted` says is watched.
export async function listen(url, shards, wanted, deliver) {
  const client = createClient({ url });
  await client.connect();
  const take = (data) => {
    let at = HEADER_BYTES;
    while (at < data.length) {
      const idBytes = data.readUInt16LE(at);
      const count = data.readUInt32LE(at + 4);
      const ids = at + GROUP_BYTES;
      const marks = ids + idBytes * count;
      for (let row = 0; row < count; row += 1) {
        const id = data.toString('latin1', ids + row * idBytes, ids + (row + 1) * idBytes);
        if (wanted(id)) deliver(id, show(data, marks + row * MARK_BYTES));
      }
      at = marks + count * MARK_BYTES;
    }
  };
  for (let shard = 0; shard < shards; shard += 1) await client.sSubscribe(`marks:{${shard}}`, take, true);
}

export const SCHEMA = `
  type NavUpdate { nav: String! cash: String! positionsValue: String! quality: String! asOf: String! sequence: Int! }
  type Query { ok: Boolean }
  type Subscription { navUpdates(portfolioId: String!, maxRateHz: Float): NavUpdate! }
`;
