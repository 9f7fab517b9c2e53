"""Figures and tables from run directories. Imports no other room."""
