from support.hub_stand_in import hub  # noqa: F401
