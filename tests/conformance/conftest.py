from tests.gateway_fixtures import gateway, portfolio_id, shard

__all__ = ["gateway", "portfolio_id", "shard"]
