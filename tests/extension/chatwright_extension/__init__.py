"""A package of others that brings a stage and a data source to chatwright, for the tests."""
