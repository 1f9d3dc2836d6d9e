// Starts GraphiQL: three example operations, and the token of the URL fragment (#token=…) in the headers pane.
//
// A fragment is never sent to a server, so the token stays out of logs. What is in the headers pane goes with every
// request, and into connection_init for subscriptions. Tabs are kept for this browser tab only: tokens of a
// development system are gone with it.

const fragment = new URLSearchParams(window.location.hash.slice(1));
const token = fragment.get("token");
const portfolioId = fragment.get("portfolio") || "demo-0001";
const headers = JSON.stringify({ Authorization: token ? `Bearer ${token}` : "Bearer …" }, null, 2);
const id = JSON.stringify(portfolioId);

const DASHBOARD = `# A portfolio at a glance.
query Dashboard {
  portfolio(portfolioId: ${id}) {
    name
    baseCurrency
    valuation { nav cash positionsValue unrealizedPnl realizedPnl dayPnl dayPnlRatio quality asOf }
    positions(first: 50) {
      edges {
        node {
          asset { symbol name sector }
          side quantity averageCost price marketValue unrealizedPnl unrealizedPnlRatio dayPnl weight quality
        }
      }
    }
    sectorAllocation { sector value weight weightAtLastFill }
    equityCurve(range: DAYS_7) { points { at nav } }
  }
}
`;

const NAV = `# Its NAV, live: a message when it changes, at most four a second.
subscription Nav {
  navUpdates(portfolioId: ${id}, maxRateHz: 4) {
    kind nav cash positionsValue quality asOf epoch sequence conflated
  }
}
`;

const VIEWER = `# Who am I, and which portfolios may I see?
query Viewer {
  viewer {
    subject
    scopes
    portfolios(first: 20) {
      edges { node { portfolioId name baseCurrency valuation { nav dayPnl quality } } }
      pageInfo { hasNextPage endCursor }
    }
  }
}
`;

const storage = window.sessionStorage;
if (token) {
  for (const key of Object.keys(storage).filter((name) => name.startsWith("graphiql:"))) {
    storage.removeItem(key);
  }
}

const url = window.location.origin + window.location.pathname;
const fetcher = GraphiQL.createFetcher({ url, subscriptionUrl: url.replace(/^http/, "ws") });

ReactDOM.createRoot(document.getElementById("graphiql")).render(
  React.createElement(GraphiQL, {
    fetcher,
    storage,
    plugins: [GraphiQLPluginExplorer.explorerPlugin()],
    defaultHeaders: headers,
    defaultQuery: DASHBOARD,
    defaultTabs: [
      { query: DASHBOARD, headers },
      { query: NAV, headers },
      { query: VIEWER, headers },
    ],
    defaultEditorToolsVisibility: "headers",
    inputValueDeprecation: true,
    isHeadersEditorEnabled: true,
    shouldPersistHeaders: true,
  }),
);
